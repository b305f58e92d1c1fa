"""`polycom doctor`: what this machine has for training, what is wrong with it, and whether a run can start.

`machine.look` finds facts and judges nothing; `judgement` and `run` make findings of them.
"""

"""`polycom doctor`: what this machine has for training, what is wrong with it, and whether a run can start.

The room `machine` finds facts and judges nothing; `judgement` and `run` make findings of them.
"""

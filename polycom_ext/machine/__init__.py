"""What a machine has: readers of it, which find facts and judge nothing.

`look.look` finds all of them; `nvidia` asks the driver, `probe` imports in a process of its own.
"""

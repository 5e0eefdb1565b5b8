"""The rollout engine: many completions in few slots, over a paged pool of their keys.

Read `engine.py` for the loop, `shard.py` for slots and pages, `scheduler.py` for what
is launched next and `programs.py` for what is compiled.
"""

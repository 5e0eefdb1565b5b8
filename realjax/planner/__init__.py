"""What an execution plan costs, before anything runs, and which one costs least.

`memory` counts bytes; `cost` the seconds of a call, `simulate` those of a step; `space`
lists the plans there are, `search` finds the best one.
"""

from realjax.planner.memory import (
    Work,
    account_counter,
    fit_pools,
    memory_account,
    memory_sizes,
)

__all__ = ["Work", "account_counter", "fit_pools", "memory_account", "memory_sizes"]

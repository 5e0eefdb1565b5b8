"""What an execution plan costs: memory, before anything runs."""

from realjax.planner.memory import (
    Work,
    account_counter,
    fit_pools,
    memory_account,
    memory_sizes,
)

__all__ = ["Work", "account_counter", "fit_pools", "memory_account", "memory_sizes"]

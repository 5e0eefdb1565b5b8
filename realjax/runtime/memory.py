"""Whether a run fits into its devices, worked out before anything is loaded."""

import dataclasses
from collections.abc import Callable, Sequence

from realjax.dataflow.account import Account
from realjax.dataflow.schedule import Step
from realjax.planner.memory import Work, account_counter, fit_pools, memory_account
from realjax.runtime.device_memory import device_bytes
from realjax.runtime.run import Run, work_of


def with_fitting_pools(run: Run) -> Run:
    """The run, its pools of keys and values no larger than its plan leaves room for."""
    limit = device_bytes(run.config)
    if not limit:
        return run
    plan = fit_pools(run.graph, run.plan, run.roles, run_work(run), limit_bytes=limit)
    return dataclasses.replace(run, plan=plan)


def run_account(run: Run) -> Account:
    """The memory account of a run's training steps."""
    limit = device_bytes(run.config)
    return memory_account(
        run.graph, run.plan, run.roles, run_work(run), limit_bytes=limit
    )


def fits_function(run: Run) -> Callable[[Sequence[Step]], bool] | None:
    """What tells whether a schedule of this run fits; None where nobody knows."""
    limit = device_bytes(run.config)
    if not limit:
        return None
    count = account_counter(
        run.graph, run.plan, run.roles, run_work(run), limit_bytes=limit
    )
    return lambda steps: count(steps).fits


def run_work(run: Run) -> Work:
    """The shapes of a run's steps."""
    data = [run.train_data, *([run.valid_data] if run.valid_data else [])]
    return work_of(run.config, data, run.width)

"""Whether a run fits into its devices, worked out before anything is loaded."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from realjax.dataflow.account import GIB, Account
from realjax.dataflow.schedule import Step
from realjax.planner.memory import Work, account_counter, fit_pools, memory_account
from realjax.runtime.agreement import Agreement
from realjax.runtime.run import Run


def device_bytes(run: Run) -> int:
    """Memory of a device: what the config says, or the device; 0 if neither knows.

    Of several processes, the least that one of them has: a schedule depends on it, and
    all must follow the same one.
    """
    if run.config.memory_gib:
        return int(run.config.memory_gib * GIB)
    own = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [int(stats.get("bytes_limit", 0)) for stats in own]
    found = Agreement("memory of a device").gather(lambda: min(limits))
    return min(found)


def with_fitting_pools(run: Run) -> Run:
    """The run, its pools of keys and values no larger than its plan leaves room for."""
    limit = device_bytes(run)
    if not limit:
        return run
    plan = fit_pools(run.graph, run.plan, run.roles, run_work(run), limit_bytes=limit)
    return dataclasses.replace(run, plan=plan)


def run_account(run: Run) -> Account:
    """The memory account of a run's training steps."""
    limit = device_bytes(run)
    return memory_account(
        run.graph, run.plan, run.roles, run_work(run), limit_bytes=limit
    )


def fits_function(run: Run) -> Callable[[Sequence[Step]], bool] | None:
    """What tells whether a schedule of this run fits; None where nobody knows."""
    limit = device_bytes(run)
    if not limit:
        return None
    count = account_counter(
        run.graph, run.plan, run.roles, run_work(run), limit_bytes=limit
    )
    return lambda steps: count(steps).fits


def run_work(run: Run) -> Work:
    """The shapes of a run's steps."""
    data = [run.train_data, *([run.valid_data] if run.valid_data else [])]
    return Work(
        num_rows=run.config.data.batch_size * run.train_data.rows_per_record,
        width=run.width,
        prompt_width=max(dataset.prompt_width for dataset in data),
    )

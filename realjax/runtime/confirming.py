"""Whether what a plan's calls take of the devices' memory comes true, before a run.

    for found in confirmed(config, plan, aot.describe("h100x8")):
        found.compiled_bytes, found.predicted_bytes, found.fits

Every call is compiled ahead of time for devices that are not there. A call holds what
stays on a device while it runs (parameters, moments, keys and values), and the
arguments, new outputs and temporaries of its largest program. In a step there are
others' parameters beside it: those are as the memory account has them.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.testing import aot
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import Run
from realjax.functions.function import Generate
from realjax.planner.cluster import Cluster
from realjax.planner.memory import CallBytes, call_bytes, memory_account
from realjax.runtime.described import DescribedProgram, described_programs
from realjax.runtime.plan_choice import Setting
from realjax.runtime.planning import described_setting
from realjax.runtime.run_config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What a program of a call holds on each device, compiled.

    Attributes:
        call, program: names.
        beside_bytes: what stays meanwhile and is no argument.
        argument_bytes, new_bytes, temporary_bytes: of the program.
        seconds: of compilation; 0 where nobody looked.
    """

    call: str
    program: str
    beside_bytes: int
    argument_bytes: int
    new_bytes: int
    temporary_bytes: int
    seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """All of it: the allocator gives temporaries out as one block."""
        held = self.beside_bytes + self.argument_bytes
        return held + self.new_bytes + self.temporary_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """A call of a plan, predicted and compiled; bytes of each of its devices.

    Attributes:
        call: its name.
        allocation: of the call.
        predicted: by the planner.
        is_home: whether its role's float32 parameters live with it.
        programs: compiled.
        account_bytes: what the fullest of its devices holds while it runs, in the
            plan's memory account.
        limit_bytes: of a device; 0 is not known.
    """

    call: str
    allocation: str
    predicted: CallBytes
    is_home: bool
    programs: tuple[CompiledProgram, ...]
    account_bytes: int = 0
    limit_bytes: int = 0

    @property
    def predicted_bytes(self) -> int:
        """What the call alone takes, by the planner."""
        found = self.predicted
        parameters = found.masters if self.is_home else found.copy
        return parameters + found.working + found.pool + found.batch

    @property
    def compiled_bytes(self) -> int:
        """What the call alone takes, by its largest program."""
        return max(program.peak_bytes for program in self.programs)

    @property
    def predicted_temporary_bytes(self) -> int:
        """Temporaries, by the planner."""
        return self.predicted.temporary

    @property
    def compiled_temporary_bytes(self) -> int:
        """Temporaries of the program that has most."""
        return max(program.temporary_bytes for program in self.programs)

    @property
    def peak_bytes(self) -> int:
        """What its fullest device holds, with what was compiled for what was said."""
        return self.account_bytes + self.compiled_bytes - self.predicted_bytes

    @property
    def fits(self) -> bool:
        """Whether that is within the device."""
        return not self.limit_bytes or self.peak_bytes <= self.limit_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "call": self.call,
            "allocation": self.allocation,
            "predicted_bytes": self.predicted_bytes,
            "compiled_bytes": self.compiled_bytes,
            "predicted_temporary_bytes": self.predicted_temporary_bytes,
            "compiled_temporary_bytes": self.compiled_temporary_bytes,
            "peak_bytes": self.peak_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "predicted": dataclasses.asdict(self.predicted),
            "programs": [dataclasses.asdict(program) for program in self.programs],
        }


def cluster_of(machine: aot.Machine) -> Cluster:
    """Return the cluster that described devices are, up to 8 of them a node.

    Args:
        machine: as "h100x8".
    """
    kind = machine.name.partition("x")[0]
    num_devices = len(machine.devices)
    num_nodes = max(1, num_devices // 8)
    return Cluster.load(f"{num_nodes}x{num_devices // num_nodes}x{kind}")


def confirmed(
    config: RunConfig,
    plan: ExecutionPlan,
    machine: aot.Machine,
    calls: tuple[str, ...] = (),
) -> Iterator[Confirmation]:
    """Compile the calls of a plan for described devices, one after the other.

    Args:
        config: of the run.
        plan: its allocations within the devices.
        machine: the devices.
        calls: which; empty means every call of a role that compiles to programs.

    Raises:
        ValueError: a call that is not in the graph, or a model that is not known.
    """
    setting = described_setting(config, cluster_of(machine))
    held = held_bytes(plan, setting)
    for name, programs in compiled_calls(config, plan, machine, calls):
        yield Confirmation(
            call=name,
            allocation=str(plan.calls[name].allocation),
            predicted=predicted_bytes(plan, setting, name),
            is_home=setting.graph.calls[name].changes_role,
            programs=programs,
            account_bytes=held[name],
            limit_bytes=setting.limit_bytes,
        )


def compiled_calls(
    config: RunConfig,
    plan: ExecutionPlan,
    machine: aot.Machine,
    calls: tuple[str, ...] = (),
) -> Iterator[tuple[str, tuple[CompiledProgram, ...]]]:
    """Compile the calls of a plan; go over their names and programs.

    Args:
        config: of the run.
        plan: its allocations within the devices.
        machine: the devices.
        calls: which; empty means every call of a role that compiles to programs.
    """
    found: list[CompiledProgram] = []
    for part in described_programs(config, machine, plan, calls):
        if found and found[0].call != part.call:
            yield found[0].call, tuple(found)
            found = []
        found.append(_compiled(part))
    if found:
        yield found[0].call, tuple(found)


def _compiled(part: DescribedProgram) -> CompiledProgram:
    report = part.compile()
    return CompiledProgram(
        call=part.call,
        program=part.name,
        beside_bytes=_device_bytes(jax.tree.leaves(part.beside)),
        argument_bytes=report.argument_bytes,
        new_bytes=report.output_bytes - report.alias_bytes,
        temporary_bytes=report.temporary_bytes,
        seconds=report.seconds,
    )


def _device_bytes(leaves: Iterable[Any]) -> int:
    """Count the bytes of arrays on a device; those in host memory take none."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in leaves
        if leaf.sharding.memory_kind in (None, "device")
    )


def predicted_bytes(plan: ExecutionPlan, setting: Setting, name: str) -> CallBytes:
    """Return what the planner says that a call takes.

    Args:
        plan: of the run.
        setting: what it is for.
        name: of the call.
    """
    num_rows = rows_of(setting.graph, setting.work.num_rows)[name]
    roles = setting.roles
    return call_bytes(setting.graph, plan, name, roles, num_rows, setting.work)


def rows_of(graph: DataflowGraph, num_rows: int) -> Mapping[str, int]:
    """Return how many sequences each call takes.

    Args:
        graph: of the algorithm.
        num_rows: of a batch of the data set.
    """
    found = {}
    for name in graph.order():
        function = graph.calls[name].function
        if isinstance(function, Generate):
            num_rows *= function.completions_per_prompt
        found[name] = num_rows
    return found


def held_bytes(plan: ExecutionPlan, setting: Setting) -> Mapping[str, int]:
    """Return what the fullest device of each call holds while it runs.

    Args:
        plan: of the run.
        setting: what it is for.
    """
    found = memory_account(
        *(setting.graph, plan, setting.roles, setting.work),
        limit_bytes=setting.limit_bytes,
    )
    held = {}
    for moment in found.moments:
        if isinstance(moment.step, Run) and moment.step.call in plan.calls:
            devices = set(plan.calls[moment.step.call].allocation.devices)
            held[moment.step.call] = max(
                int(size)
                for group, size in zip(found.groups, moment.device_bytes, strict=True)
                if devices.intersection(group)
            )
    return held

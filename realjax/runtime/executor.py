"""The executor: one pass through the graph, each call on its own mesh.

    schedule ──▶ Move | Run | Release | …      one Python thread, in order
                  │      │
      reallocate ─┘      └─ compiled function of (parameters on the call's mesh, batch)

Dispatch is asynchronous: calls on disjoint meshes overlap, and so do copies. The thread
waits in two places only, for the lengths of completions (they decide the packing) and
for text. Every process of a run goes through the same schedule; a call runs in those
that have a device of its mesh.

With staleness 1 a training step also draws for the step after it; see `ahead`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from realjax.core.batch import Batch
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow import schedule as schedule_lib
from realjax.dataflow.buffer import Buffer
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import Generate, Train
from realjax.functions.role import Role
from realjax.planner.memory import streamed_roles
from realjax.realloc.transfer import Traffic
from realjax.rollout.session import OnProgress
from realjax.runtime.ahead import Ahead
from realjax.runtime.calls import Calls, Pass
from realjax.runtime.measures import Metrics
from realjax.runtime.parameters import ParameterStore
from realjax.runtime.programs import Programs
from realjax.runtime.watch import Watch


class Executor:
    """Runs steps of one graph; holds compiled programs and the roles' parameters.

    Attributes:
        store: parameters and optimizer states of every role.
        programs: compiled functions of the calls.
        calls: runs one call; holds states of transforms.
        ahead: keeps what was drawn for the next step.
        watch: observes when each call began and ended.
        traffic: bytes of parameters moved by the last step, by route.
        batch_traffic: the same of batch keys.
        sends: how often a key was sent to a mesh in one step, at most.
        after_call: told each call's name when it is done, if set; dispatch then waits.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        plan: ExecutionPlan,
        roles: Mapping[str, Role],
        store: ParameterStore,
        *,
        tokenizer: Tokenizer,
        optimizer_steps: Mapping[str, int],
        seed: int,
        width: int,
        watch: Watch | None = None,
        fits: Callable[[Sequence[schedule_lib.Step]], bool] | None = None,
        name: str = "",
    ):
        """Prepares the schedule; programs are compiled when first used.

        Args:
            graph: of the algorithm.
            plan: allocations.
            roles: by name.
            store: holds the roles' parameters at their homes.
            tokenizer: for work on text.
            optimizer_steps: updates of the whole run, by training call.
            seed: of sampling and of minibatch order.
            width: T, tokens of a sequence.
            watch: observes when calls end.
            fits: tells whether a schedule fits the devices' memory; None: any does.
            name: of one beside the run's own, for exchanges between processes.
        """
        self.graph, self.plan, self.store = graph, plan, store
        self.watch = watch or Watch()
        self.traffic, self.batch_traffic = Traffic(), Traffic()
        self.sends: dict[tuple, int] = {}
        self.after_call: Callable[[str], None] | None = None
        self.programs = Programs(
            graph, plan, roles, optimizer_steps=optimizer_steps, seed=seed, width=width
        )
        self.calls = Calls(self.programs, store, self.watch, tokenizer, name)
        self.ahead = Ahead(self.calls)
        functions = {name: node.function for name, node in graph.calls.items()}
        generates = any(isinstance(f, Generate) for f in functions.values())
        trains = [name for name, f in functions.items() if isinstance(f, Train)]
        make = functools.partial(
            schedule_lib.make_schedule,
            graph,
            plan,
            {name: role.dtype for name, role in roles.items()},
            streamed=streamed_roles(roles),
            fits=fits,
            homes=store.homes,
            resting=store.resting,
        )
        self.steps = make()
        stale = graph.stale_calls
        others = [name for name in graph.calls if name not in stale]
        # A first step's own rollout has no step before it, and a last one no next.
        self.first_steps = make(is_training=False, without=others) if stale else []
        self.last_steps = make(without=stale) if stale else self.steps
        # Losses of completions drawn just now say nothing: every ratio is 1.
        self.evaluation_steps = make(
            is_training=False, without=trains if generates else ()
        )

    def close(self) -> None:
        """Ends worker processes and the watch."""
        self.calls.close()
        self.watch.close()

    def run(
        self,
        batch: Batch,
        *,
        step: int,
        training: bool = True,
        ahead: Batch | None = None,
        on_progress: OnProgress | None = None,
    ) -> tuple[Metrics, Buffer]:
        """One pass through the graph.

        Args:
            batch: of the data set.
            step: number of the step; draws depend on it.
            training: False changes nothing; the losses of training calls are measured
                where the data set holds the completions.
            ahead: the batch of the next step, for calls that run a step ahead; None
                draws nothing for it, as in the last step.
            on_progress: told how far generation is.

        Returns:
            Metrics, most still being computed, and everything the calls made. In a run
            of several processes each has the metrics of the calls it ran.

        Raises:
            ValueError: what waits was drawn for another step, or there is a batch
                ahead and no call runs ahead.
            VersionError: a call would see other parameters than the graph says.
        """
        self.traffic, self.batch_traffic = Traffic(), Traffic()
        self.store.begin_step()
        passing = functools.partial(
            Pass,
            traffic=self.traffic,
            is_training=training,
            versions={
                task.call: task.version
                for task in self.steps
                if isinstance(task, schedule_lib.Run)
            },
            on_progress=on_progress,
        )
        if training and self.ahead.names:
            metrics, buffer = self._run_ahead(batch, ahead, step, passing)
        elif ahead is None:
            buffer = Buffer(batch, self.batch_traffic)
            steps = self.steps if training else self.evaluation_steps
            metrics = self._issue(steps, passing(buffer=buffer, step=step))
        else:
            raise ValueError(
                "There is a batch for the next step, and no call of this pass runs a "
                "step ahead. Give `ahead` to training steps of a graph with staleness "
                "1 only."
            )
        for key, count in buffer.sends.items():
            self.sends[key] = max(count, self.sends.get(key, 0))
        return metrics, buffer

    def _run_ahead(
        self, batch: Batch, ahead: Batch | None, step: int, passing: Callable[..., Pass]
    ) -> tuple[Metrics, Buffer]:
        """Trains on what the step before has drawn; draws for the next step."""
        drawn = self.ahead.take(batch, step, self.batch_traffic)
        if drawn is None:
            drawn = self.ahead.begin(batch, step, self.batch_traffic)
            first = passing(buffer=drawn.buffer, step=step)
            drawn.metrics.update(self._issue(self.first_steps, first))
        metrics = dict(drawn.metrics)
        metrics["completions/staleness"] = [self.ahead.staleness(drawn)]
        this = passing(buffer=drawn.buffer, step=step)
        following = None
        if ahead is None:
            metrics |= self._issue(self.last_steps, this)
        else:
            following = self.ahead.begin(ahead, step + 1, self.batch_traffic)
            later = passing(buffer=following.buffer, step=step + 1)
            metrics |= self._issue(self.steps, this, (later, following.metrics))
        self.ahead.wait_with(following)
        return metrics, drawn.buffer

    def _issue(
        self,
        steps: Sequence[schedule_lib.Step],
        passing: Pass,
        later: tuple[Pass, Metrics] | None = None,
    ) -> Metrics:
        """Goes through a schedule.

        Args:
            steps: of the schedule.
            passing: the pass that calls are part of.
            later: that of the next step, for calls that run a step ahead, and their
                metrics, which are added to.

        Returns:
            Metrics of the other calls.
        """
        metrics: Metrics = {}
        for task in steps:
            if not isinstance(task, schedule_lib.Run):
                self._copy(task, passing.step)
                continue
            where, found = passing, metrics
            if later is not None and self.graph.calls[task.call].staleness:
                where, found = later
            found.update(self.calls.run(task.call, task.version, where))
            if self.after_call is not None:
                self.watch.wait()
                self.after_call(task.call)
        return metrics

    def _copy(self, task: schedule_lib.Step, step: int) -> None:
        """Moves parameters, or drops copies of them."""
        store = self.store
        match task:
            case schedule_lib.Move(role, place, version):
                with self._moving(f"{role} to {place}", place, step) as event:
                    event.watch(store.move(role, place, self.traffic, version=version))
            case schedule_lib.Release(role, place):
                store.release(role, place)
            case schedule_lib.Reload(role, part):
                home = store.homes[role]
                with self._moving(f"{task}", home, step, "offload") as event:
                    event.watch(store.reload(role, part))
            case schedule_lib.Offload(role, part):
                home = store.homes[role]
                with self._moving(f"{task}", home, step, "offload") as event:
                    event.watch(store.offload(role, part))

    def _moving(
        self, name: str, place: schedule_lib.Place, step: int, kind: str = "realloc"
    ):
        """Observes a reallocation, an offload or a reload."""
        return self.watch.calling(name, place.allocation.devices, step=step, kind=kind)

    def compile_prompt_widths(self, widths: Sequence[int], num_prompts: int) -> None:
        """Compiles generation for every prompt width, on prompts of no tokens."""
        for name, node in self.graph.calls.items():
            if not isinstance(node.function, Generate) or node.role is None:
                continue
            self.store.begin_step()
            place = self.calls.place(name)
            is_copied = place.key != self.store.homes[node.role].key
            if is_copied:
                self.store.move(node.role, place, Traffic())
            parameters = self.store.get(node.role, place, 0)
            program = self.programs.get(name, num_prompts)
            for width in widths:
                inputs = self.calls.prompts(name, node, _no_prompts(num_prompts, width))
                if self.calls.is_here(name):
                    program.warm_up(parameters, inputs)
            del parameters
            if is_copied:
                self.store.release(node.role, place)
        self.store.rest()


def _no_prompts(num_prompts: int, width: int) -> Buffer:
    prompts: dict[str, Any] = {"prompts": np.zeros((num_prompts, width), np.int32)}
    lengths = np.zeros(num_prompts, np.int32)
    return Buffer(Batch.create(prompts, lengths=lengths))

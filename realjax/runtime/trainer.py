"""The trainer: steps, evaluation, checkpoints, metrics, and a clean end.

prepare ──▶ restore or load ──▶ [ step ─▶ metrics ─▶ evaluate? ─▶ save? ]* ──▶ export
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from realjax.core import metrics as metrics_lib
from realjax.core.timing import Rate
from realjax.data.loader import Loader
from realjax.dataflow.draw import graph_svg
from realjax.functions.function import Generate
from realjax.functions.score import RewardError
from realjax.realloc.links import check_links
from realjax.runtime import cluster, report, resuming, stored
from realjax.runtime.checkpoint import Checkpointer
from realjax.runtime.console import Console
from realjax.runtime.evaluation import Evaluation, evaluate, show_change
from realjax.runtime.executor import Executor
from realjax.runtime.exports import export, tell_exports
from realjax.runtime.kept_plan import read_plan, write_plan
from realjax.runtime.links import plan_links
from realjax.runtime.measures import call_seconds, to_numbers
from realjax.runtime.memory import fits_function, run_account, with_fitting_pools
from realjax.runtime.model import Model
from realjax.runtime.predictions import Predictions, compared
from realjax.runtime.profile import Profiler
from realjax.runtime.rescue import rescuing
from realjax.runtime.run import Run, load_parameters, prepare
from realjax.runtime.run_config import RunConfig
from realjax.runtime.trials import Trials
from realjax.runtime.workdir import claim_workdir

WARM_UP_STEPS = 2
"""Steps that compile; left out of medians."""


class NonFiniteError(RuntimeError):
    """Too many updates were skipped because a loss or gradient was not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        roles: models of every role, on the devices they were trained on.
        metrics: one array a metric, aligned by "step"; NaN where a step has none.
        workdir: checkpoints, exports, metrics and report.
        is_finished: False after Ctrl-C or SIGTERM; the same command goes on. A
            benchmark has finished after its own steps.
    """

    roles: dict[str, Model]
    metrics: dict[str, np.ndarray]
    workdir: pathlib.Path
    is_finished: bool


def train(
    config: RunConfig,
    workdir: str | pathlib.Path,
    *,
    algorithm: Any = None,
    console: Console | None = None,
) -> TrainResult:
    """Runs a config, or goes on with it where the folder already holds the run.

    Args:
        config: of the run.
        workdir: folder of its checkpoints, exports, metrics and report.
        algorithm: module or object with `graph` and `HYPERPARAMETERS`; by default the
            one that `config.algorithm` names.
        console: where progress is shown.

    Raises:
        ValueError, TypeError, FileNotFoundError: the config or the data is wrong; found
            before anything compiles.
        NonFiniteError: training diverged; the last checkpoint is untouched.
        RewardError: a reward function failed; what was learned before is saved.
    """
    console, workdir = console or Console(), pathlib.Path(workdir)
    run = prepare(config, algorithm, kept=read_plan(workdir), tell=console.print)
    trainer = Trainer(run, workdir, console)
    with contextlib.closing(trainer):
        return trainer.train()


class Trainer:
    """One run in one folder."""

    def __init__(self, run: Run, workdir: pathlib.Path, console: Console):
        """Claims the folder, loads weights or the last checkpoint."""
        self.run, self.workdir, self.console = run, workdir, console
        # Processes share the folder; what belongs to all of them, the first one writes.
        self.is_first = jax.process_index() == 0
        own = workdir if self.is_first else workdir / f"process{jax.process_index()}"
        self.profiler = Profiler(run.config.profile_steps, own)
        self.step = self.num_nonfinite = 0
        self._is_measured = True  # Unless evaluation after the last step failed.
        self.stop_signal: int | None = None  # The same in all processes.
        self._own_signal: int | None = None
        self.samples: dict[str, list[dict]] = {}
        with contextlib.ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()  # Nothing failed: `close` closes them.

    def _open(self, opened: contextlib.ExitStack) -> None:
        self.run = run = with_fitting_pools(self.run)
        config = run.config
        checkpoints = self.workdir / "checkpoints"
        opened.enter_context(
            claim_workdir(
                self.workdir,
                run.fingerprint(),
                has_begun=lambda: any(checkpoints.glob("[0-9]*")),
            )
        )
        self.checkpointer = opened.enter_context(
            Checkpointer(checkpoints, keep=config.checkpoint.keep)
        )
        stored.fill(run, self.workdir, self.console)
        chosen = dataclasses.replace(run.chosen, plan=run.plan)
        self.console.print(chosen.summary())
        run_account(run).check()
        self.predictions = Predictions(chosen, warm_up_steps=WARM_UP_STEPS)
        if self.is_first:
            write_plan(self.workdir, run)
        self.executor = Executor(
            run.graph,
            run.plan,
            run.roles,
            load_parameters(run),
            tokenizer=run.tokenizer,
            optimizer_steps=run.optimizer_steps,
            seed=config.seed,
            width=run.width,
            fits=fits_function(run),
        )
        opened.callback(self.executor.close)
        self._trials = Trials(run, self.executor) if run.trials else None
        self._num_rows = config.data.batch_size * run.train_data.rows_per_record
        self.executor.calls.generating.prepare(self._num_rows)
        self.loader = Loader(
            run.train_data,
            batch_size=config.data.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            num_epochs=0 if config.steps else config.epochs,
            rows=self.executor.calls.rows_here(self._num_rows),
        )
        store = self.executor.store
        for role in run.graph.trained_roles:
            program = self.executor.programs.train_program(role)
            store.set_train_state(role, program.init_optimizer(store.at_home(role)))
            store.rest()  # All at the same time may be more than the devices hold.
        self._restore()
        # Devices of a CPU have no links: their copies are within one memory.
        if config.check_links and jax.default_backend() != "cpu":
            check_links(plan_links(self.executor, self._num_rows, run.width))
        self._first_step = self.step
        self.metrics = self._metrics_writers()
        opened.callback(self.metrics.close)
        opened.callback(self.profiler.close)

    def close(self) -> None:
        """Ends threads and worker processes, gives the folder back."""
        self._opened.close()

    # -- the loop ------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Steps until the end, a signal, or too many updates that are not finite."""
        config, steps = self.run.config, self.run.steps
        benchmark = config.benchmark_steps
        last = min(steps, self.step + benchmark) if benchmark else steps
        rate = Rate()
        self._saved_seconds = time.monotonic()
        with self._signals():
            if self.step == 0:
                self._warm_up()
                if config.evaluation.at_start and not benchmark:
                    self.metrics.write(0, self._evaluate("before training"))
            elif not self._is_measured:
                self._measure({})
            while not self._is_stopped() and self.step < last:
                with self._rescuing():
                    numbers, is_epoch_end, num_epochs = self._step(rate)
                self._measure(numbers)
                if self.step == last or config.checkpoint.is_due(
                    step=self.step,
                    epoch=num_epochs,
                    is_epoch_end=is_epoch_end,
                    minutes_since_save=self._minutes_since_save,
                ):
                    self._save()
            if self.step and self.stop_signal is not None:
                self._save(exports=False)
            self.checkpointer.wait()
        if self.stop_signal is not None:
            self.console.print(
                f"stopped by {signal.Signals(self.stop_signal).name} after step "
                f"{self.step}; the same command goes on from there"
            )
        if self.step >= steps and config.checkpoint.export:
            tell_exports(self.run, self.executor.store, self.workdir, self.console)
        self._finish(benchmark)
        return TrainResult(
            roles=self._models(),
            metrics=metrics_lib.read_metrics(self.workdir / "metrics.jsonl"),
            workdir=self.workdir,
            is_finished=self.step >= steps or self.stop_signal is None,
        )

    def _rescuing(self) -> contextlib.AbstractContextManager[None]:
        save = lambda: self._save(exports=False)
        parts = (self.executor, self.loader, self.checkpointer)
        return rescuing(*parts, save, step=self.step)

    def _step(self, rate: Rate) -> tuple[dict[str, float], bool, int]:
        """One step: its metrics, whether it ended an epoch, how many are done."""
        begin = time.perf_counter()
        batch, epoch, is_epoch_end = self.loader.next_batch()
        step, watch = self.step + 1, self.executor.watch
        has_next = bool(self.run.graph.stale_calls) and step < self.run.steps
        ahead = self.loader.peek_batch() if has_next else None
        watch.timeline.take()  # An evaluation's calls are not of this step.
        bar = self.console.rollout_progress()
        with self.profiler.step(step, self.executor), bar as on_progress:
            found, buffer = self.executor.run(
                batch, step=step, ahead=ahead, on_progress=on_progress
            )
            own = to_numbers(found)
            watch.wait()
        # A save has had this step's time. Were it still under way when later steps are
        # done, a kill would cost more than the steps between two saves.
        self.checkpointer.wait()
        self.step = step
        own |= self._performance(buffer, time.perf_counter() - begin)
        own |= call_seconds(watch.timeline.take()) | self.predictions.numbers
        numbers = self._agree(own)
        for text in self.predictions.observe(numbers):
            self.console.print(text)
        rate.update(tokens=numbers["num_tokens"])
        self.console.step(step, self.run.steps, epoch, numbers, rate)
        position = int(self.loader.state()["position"])
        num_epochs = position // len(self.run.train_data)
        return {"epoch": epoch} | numbers, is_epoch_end, num_epochs

    def _measure(self, numbers: dict[str, float]) -> None:
        """Evaluates after a step if that is due, and writes its metrics."""
        failed = None
        try:
            if self._evaluation_is_due():
                numbers |= self._evaluate(f"step {self.step}")
        except RewardError as error:
            failed = error
        self._is_measured = failed is None
        self.metrics.write(self.step, numbers)
        self._check_finite(numbers)
        if failed is not None:
            if jax.process_count() == 1:  # Else others may be anywhere in it.
                self._save(exports=False)
                self.checkpointer.wait()
            raise failed

    def _agree(self, numbers: dict[str, float]) -> dict[str, float]:
        """What all processes know after a step, so that they decide alike.

        Each has the metrics of the calls it ran, and their clocks differ.
        """
        minutes = (time.monotonic() - self._saved_seconds) / 60
        found = cluster.gather(
            f"step/{self.step}", {"numbers": numbers, "minutes": minutes}
        )
        self._minutes_since_save = found[0]["minutes"]
        return {k: v for one in found[::-1] for k, v in one["numbers"].items()}

    def _is_stopped(self) -> bool:
        """Whether a signal came to any process, at whatever time: all find the same."""
        found = cluster.gather(f"signal/{self.step}", self._own_signal)
        self.stop_signal = next((one for one in found if one is not None), None)
        return self.stop_signal is not None

    def _evaluation_is_due(self) -> bool:
        config = self.run.config
        if config.benchmark_steps:
            return False
        if self.step == self.run.steps:
            return config.evaluation.at_end
        every = config.evaluation.every_steps
        return every > 0 and self.step % every == 0

    def _performance(self, buffer, seconds: float) -> dict[str, float]:
        counted = [k for k in buffer.lengths if k in buffer and k != "prompts"]
        tokens = float(sum(np.sum(buffer.lengths[key]) for key in counted))
        executor = self.executor
        return {
            "num_tokens": tokens,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens / seconds,
            **executor.traffic.as_dict("realloc/"),
            **executor.batch_traffic.as_dict("batch/"),
        }

    def _check_finite(self, numbers: dict[str, float]) -> None:
        """Counts skipped updates; gives up after the configured number."""
        bad = sum(v for k, v in numbers.items() if k.split("/")[0] == "nonfinite")
        if not bad:
            return
        self.num_nonfinite += int(bad)
        self.console.print(
            f"step {self.step}: {int(bad)} update(s) skipped, loss or gradient not "
            f"finite ({self.num_nonfinite} of {self.run.config.max_nonfinite} allowed)"
        )
        if self.num_nonfinite > self.run.config.max_nonfinite:
            last = self.checkpointer.latest_step()
            raise NonFiniteError(
                f"{self.num_nonfinite} updates had a loss or gradient that was not "
                f"finite, more than config.max_nonfinite="
                f"{self.run.config.max_nonfinite}. Lower the learning rate or look at "
                f"the data. "
                + (
                    "No checkpoint was saved yet."
                    if last is None
                    else f"The checkpoint of step {last} is untouched."
                )
            )

    def _warm_up(self) -> None:
        """Compiles the generation programs of every prompt width before step 1."""
        data, executor = self.run.train_data, self.executor
        generates = any(
            isinstance(node.function, Generate)
            for node in self.run.graph.calls.values()
        )
        if generates and len(data.length_buckets) > 1:
            executor.compile_prompt_widths(
                data.length_buckets, self.run.config.data.batch_size
            )

    def _evaluate(self, when: str) -> dict[str, float]:
        """Metrics of the held-out data; keeps the first and the last completions."""
        if self.run.valid_data is None:
            return {}
        found: Evaluation = evaluate(
            self.run, self.executor, self.console, when, self._trials
        )
        if found.samples:
            self.samples["after" if self.step else "before"] = found.samples
        self.console.evaluation(when, found.numbers)
        return found.numbers

    # -- checkpoints ---------------------------------------------------------------

    def _save(self, *, exports: bool = True) -> None:
        """Everything the run needs to go on; written while the next step runs.

        The last step's export comes first: where its checkpoint is, so is its export.
        """
        is_last = self.step >= self.run.steps
        has_export = exports and self.run.config.checkpoint.export
        if has_export and is_last:
            export(self.run, self.executor.store, self.workdir)
        self.checkpointer.save(
            self.step,
            resuming.saved_arrays(self.executor),
            {
                "loader": self.loader.state(),
                "num_nonfinite": self.num_nonfinite,
                "plan": self.run.plan.as_dict(),
                "samples": self.samples,
                "is_measured": self._is_measured,
                **resuming.saved_notes(self.executor),
            },
        )
        if has_export and not is_last:
            export(self.run, self.executor.store, self.workdir)
        self._saved_seconds = time.monotonic()

    def _restore(self) -> None:
        """The last complete checkpoint, on whatever allocation this run has."""
        if not self.checkpointer.steps():
            return

        found = resuming.restore(
            self.executor, self.checkpointer, self.loader, num_prompts=self._num_rows
        )
        self.step = found.step
        self.num_nonfinite = found.metadata["num_nonfinite"]
        self.samples = found.metadata["samples"]
        self._is_measured = found.metadata.get("is_measured", True)
        self.console.print(f"resumed from the checkpoint of step {self.step}")

    # -- around it -----------------------------------------------------------------

    def _metrics_writers(self) -> metrics_lib.Fanout:
        config, path = self.run.config, self.workdir / "metrics.jsonl"
        if not self.is_first:
            return metrics_lib.Fanout([])
        is_new = not path.exists()
        writers: list[Any] = [metrics_lib.JsonLines(path)]
        if config.tensorboard:
            writers.append(metrics_lib.TensorBoard(self.workdir / "tensorboard"))
        if config.wandb_project:
            writers.append(
                metrics_lib.WeightsAndBiases(
                    config.wandb_project, name=self.workdir.name, folder=self.workdir
                )
            )
        metrics = metrics_lib.Fanout(writers)
        if not is_new:
            metrics.truncate_after(self.step)
        return metrics

    def _models(self) -> dict[str, Model]:
        store = self.executor.store
        return {
            name: Model(
                role.model,
                store.at_home(name),
                allocation=store.homes[name].allocation,
                dtype=role.dtype,
                tokenizer=self.run.tokenizer,
            )
            for name, role in self.run.roles.items()
            if name in self.run.graph.roles  # Trials alone use the others.
        }

    def _finish(self, benchmark: int) -> None:
        """Medians of a benchmark, and the report page."""
        cluster.barrier(f"end/{self.step}")
        columns = metrics_lib.read_metrics(self.workdir / "metrics.jsonl")
        if not self.is_first:
            return
        if benchmark:
            rows = compared(columns, warm_up_steps=WARM_UP_STEPS)
            names = ("", "predicted", "measured")
            self.console.table("seconds of calls", names, rows)
            self.console.medians(
                {
                    name: values[WARM_UP_STEPS:].tolist()
                    for name, values in columns.items()
                    if name.startswith(("timing_s/", "perf/"))
                }
            )
        show_change(columns, self.console)
        if len(self.samples) == 2:
            self.console.completions(self.samples["before"], self.samples["after"])
        page = self.workdir / "report.html"
        if self.step > self._first_step or not page.exists():
            page = self._write_report(columns)
        self.console.print(f"report {page}")

    def _write_report(self, columns: dict[str, np.ndarray]) -> pathlib.Path:
        return report.write_report(
            self.workdir,
            title=f"{self.run.config.algorithm}: {self.workdir.name}",
            metrics=columns,
            timeline=self.executor.watch.timeline,
            samples_before=self.samples.get("before", []),
            samples_after=self.samples.get("after", []),
            graph_svg=graph_svg(self.run.graph, self.run.plan),
            plan_text=self.run.plan.table(),
            extra={},
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the step, then the run; a second Ctrl-C is rough."""

        def stop(number, _):
            if self._own_signal is not None:
                raise KeyboardInterrupt
            self._own_signal = number
            self.console.print("stopping after this step; a checkpoint will be saved")

        watched = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {number: signal.signal(number, stop) for number in watched}
        except ValueError:  # Not the main thread: the caller handles signals.
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

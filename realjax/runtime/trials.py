"""Trials: completions of held-out prompts that evaluation alone asks for.

    policy     ─▶ rollout ─▶ judge      scores, and a verifier's verdict on the text
    reference  ─▶ rollout ─▶ judge      the same prompts, drawn with the same keys

How often the policy's score above the reference's is the win rate; how often at least
one of k passes is pass@k. Each role has a graph of its own, which runs as a training
step's does: on the rollout engine, by the run's own parameters, moved to where the plan
of the trial says. A role that no step uses waits in host memory between trials.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realjax.data.loader import evaluation_batches
from realjax.dataflow.schedule import Move
from realjax.functions.function import Generate
from realjax.functions.score import RewardFunction, RewardWorkers
from realjax.rl import estimates
from realjax.runtime.console import Console
from realjax.runtime.executor import Executor
from realjax.runtime.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completed:
    """What one role's trial gave, for N completions of each of B prompts.

    Attributes:
        judged: the judge's scores, [B, N]; None without a judge.
        scores: what each Python function says, [B, N].
        samples: prompt, completion and score of the first few.
    """

    judged: np.ndarray | None
    scores: dict[str, np.ndarray]
    samples: list[dict[str, Any]]


class Trials:
    """The trials of a run; programs and the reference's scores are kept."""

    def __init__(self, run: Run, executor: Executor):
        """Compiles nothing yet.

        Args:
            run: with trials.
            executor: of its steps; holds the parameters.
        """
        self.run, self.training = run, executor
        self.evaluation = run.config.evaluation
        self._executors: dict[str, Executor] = {}
        self._against: Completed | None = None

    def measure(
        self, console: Console, when: str
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Completes every held-out prompt.

        Args:
            console: shows progress.
            when: a word for the progress bar.

        Returns:
            Metrics under "eval/", and the first few completions of the policy.
        """
        policy = next(iter(self.run.trials))
        against = self.evaluation.against if self.evaluation.judge else ""
        functions = self._functions()
        if functions:
            with RewardWorkers(functions) as workers:
                mine = self._complete(policy, console, when, workers)
                failures = dict(workers.num_failures)
        else:
            mine, failures = self._complete(policy, console, when), {}
        numbers = self._function_numbers(functions, mine, failures)
        if against:
            if self._against is None or against in self.run.graph.changed_roles:
                self._against = self._complete(against, console, when, num_samples=0)
            numbers |= self._judge_numbers(policy, mine, against, self._against)
        return {f"eval/{name}": value for name, value in numbers.items()}, mine.samples

    def _functions(self) -> tuple[RewardFunction, ...]:
        """The verifier; rewards too, where a step's own evaluation has no texts."""
        verifier, rewards = self.evaluation.verifier, self.evaluation.other_rewards
        calls = self.run.graph.calls.values()
        if any(isinstance(node.function, Generate) for node in calls):
            rewards = ()
        return (*((verifier,) if verifier else ()), *rewards)

    def _complete(
        self,
        role: str,
        console: Console,
        when: str,
        workers: RewardWorkers | None = None,
        *,
        num_samples: int | None = None,
    ) -> Completed:
        """Completions of one role and what is said of them."""
        if num_samples is None:
            num_samples = self.evaluation.num_samples
        trial, executor = self.run.trials[role], self._executor(role)
        data = self.run.config.data
        size = data.valid_batch_size or data.batch_size
        rows = executor.calls.rows_here(size)
        batches = list(evaluation_batches(trial.data, size, rows))
        judged: list[np.ndarray] = []
        scores: dict[str, list[np.ndarray]] = {}
        samples: list[dict[str, Any]] = []
        self.training.programs.drop_pools()  # Two would not fit beside each other.
        with console.progress(f"{role} {when}", len(batches)) as advance:
            for index, batch in enumerate(batches):
                _, buffer = executor.run(batch, step=index, training=False)
                found = None
                if self.evaluation.judge:
                    found = executor.calls.fetch(buffer, "scores")["scores"]
                    found = found[buffer.ids >= 0]
                    judged.append(found)
                if workers is not None or len(samples) < num_samples:
                    texts = executor.calls.texts(buffer)
                    each = workers.score_each(*texts) if workers is not None else {}
                    for name, values in each.items():
                        scores.setdefault(name, []).append(values)
                    shown = found if found is not None else next(iter(each.values()))
                    samples += samples_of(texts, shown, every=self._num_completions)
                advance()
        executor.programs.drop_pools()
        training = self.training
        moves = [
            (step.role, step.place)
            for step in (*training.first_steps, *training.steps)
            if isinstance(step, Move)
        ]
        training.store.keep_bases(moves)  # What trials alone need comes anew.
        return Completed(
            judged=self._by_prompt(judged) if judged else None,
            scores={name: self._by_prompt(parts) for name, parts in scores.items()},
            samples=samples[:num_samples],
        )

    @property
    def _num_completions(self) -> int:
        return self.evaluation.completions_per_prompt

    def _by_prompt(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).reshape(-1, self._num_completions)

    def _function_numbers(
        self,
        functions: Sequence[RewardFunction],
        found: Completed,
        failures: Mapping[str, int],
    ) -> dict[str, float]:
        """Metrics of the verifier and the rewards."""
        numbers: dict[str, float] = {}
        for function in functions:
            name, scores = function.name, found.scores[function.name]
            numbers |= with_error(f"{name}_mean", scores.mean(axis=1))
            numbers[f"rewards/{name}/failures"] = float(failures[name])
        verifier = self.evaluation.verifier
        if verifier is not None:
            passed = found.scores[verifier.name] >= self.evaluation.pass_score
            for k in self.evaluation.pass_at:
                numbers |= with_error(f"pass@{k}", estimates.pass_at_k(passed, k))
        return numbers

    def _judge_numbers(
        self, policy: str, mine: Completed, against: str, theirs: Completed
    ) -> dict[str, float]:
        """Metrics of the judge."""
        assert mine.judged is not None and theirs.judged is not None
        return (
            with_error("win_rate", estimates.win_rates(mine.judged, theirs.judged))
            | with_error(f"judge/{policy}_mean", mine.judged.mean(axis=1))
            | with_error(f"judge/{against}_mean", theirs.judged.mean(axis=1))
        )

    def _executor(self, role: str) -> Executor:
        if role not in self._executors:
            trial, run = self.run.trials[role], self.run
            self._executors[role] = Executor(
                trial.graph,
                trial.plan,
                run.roles,
                self.training.store,
                tokenizer=run.tokenizer,
                optimizer_steps={},
                seed=run.config.seed,
                width=trial.width,
                watch=self.training.watch,
                name=f"trial of {role}",
            )
        return self._executors[role]


def with_error(name: str, values: np.ndarray) -> dict[str, float]:
    """A mean over prompts under a name, and its standard error beside it."""
    mean, error = estimates.mean_and_error(np.asarray(values, np.float64))
    return {name: mean, f"{name.removesuffix('_mean')}_standard_error": error}


def samples_of(
    texts: tuple[list[str], list[str], Mapping[str, list]],
    scores: np.ndarray | None,
    *,
    every: int = 1,
) -> list[dict[str, Any]]:
    """Texts and scores of a batch's completions.

    Args:
        texts: prompts, completions and columns.
        scores: of the completions, if they are known.
        every: completions of a prompt, of which the first is taken.
    """
    prompts, completions, _ = texts
    known = [None] * len(prompts) if scores is None else scores.tolist()
    return [
        {"prompt": prompts[i], "completion": completions[i], "score": known[i]}
        for i in range(0, len(prompts), every)
    ]

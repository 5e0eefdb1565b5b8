"""Generate: the rollout engine as the compiled form of a call."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from realjax.core.arrays import Array, Key, PyTree
from realjax.functions.function import Generate
from realjax.functions.packed import ModelProgram
from realjax.rollout.engine import Engine
from realjax.rollout.rows import Rollout
from realjax.rollout.session import OnProgress, Session
from realjax.rollout.settings import Settings


class GenerateProgram:
    """The compiled form of one `Generate` on one mesh.

    Args:
        spec: sampling and completions per prompt.
        program: the model.
        mesh: of the call.
        eos_ids: ids that end a completion.
        width: T, tokens of prompt and completion together.
        settings: slots, pages and launches of the engine.

    Attributes:
        engine: samples; keeps its pool from one call to the next.
    """

    def __init__(
        self,
        spec: Generate,
        program: ModelProgram,
        mesh: jax.sharding.Mesh,
        *,
        eos_ids: tuple[int, ...],
        width: int,
        settings: Settings,
    ):
        """Compiles nothing yet."""
        self.spec = spec
        self.engine = Engine(
            program,
            mesh,
            spec.sampling,
            eos_ids=eos_ids,
            width=width,
            settings=settings,
        )

    def described(self, num_prompts: int) -> Rollout:
        """Shapes, types and shardings of all completions of so many prompts."""
        size = num_prompts * self.spec.completions_per_prompt
        return self.engine.programs.described(size)

    def warm_up(
        self, parameters: PyTree, prompts: Mapping[str, np.ndarray | Array]
    ) -> None:
        """Compiles all that a rollout of such prompts may launch; samples nothing."""
        group = self.spec.completions_per_prompt
        self.engine.warm_up(parameters, prompts, completions_per_prompt=group)

    def session(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        key: Key[Array, ""],
        **options: Any,
    ) -> contextlib.AbstractContextManager[Session]:
        """Begin a rollout, see `Engine.session`."""
        group = self.spec.completions_per_prompt
        return self.engine.session(
            parameters, prompts, key, completions_per_prompt=group, **options
        )

    def __call__(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        key: Key[Array, ""],
        on_progress: OnProgress | None = None,
    ) -> Rollout:
        """Samples every completion of every prompt, [B * completions_per_prompt, T].

        Args:
            parameters: on this mesh.
            prompts: "prompts" [B, P] left-aligned, "lengths" [B] (0 for a padding row;
                on the host) and "ids" [B] of the data.
            key: of this call in this step.
            on_progress: told completions that have ended, all, and tokens sampled.
        """
        return self.engine(
            parameters,
            prompts,
            key,
            completions_per_prompt=self.spec.completions_per_prompt,
            on_progress=on_progress,
        )

"""A role: whose parameters a call uses, where they come from, how they are computed."""

import dataclasses

from realjax.core.config import check_choice
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import ModelProgram
from realjax.models.config import ModelConfig
from realjax.models.transformer import REMATS
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One role of a run.

    Attributes:
        path: folder of a Hugging Face checkpoint; empty for a new model.
        tokenizer: folder of its tokenizer; empty means `path`.
        model: sizes of a new model, by the names of `ModelConfig` (the vocabulary's
            comes from the tokenizer).
        dtype: of matrix products; "" means bfloat16 on a GPU, float32 elsewhere.
        remat: what the backward pass computes anew, one of `transformer.REMATS`.
        offload: whether a role that no call trains waits in host memory.
        optimizer: of a trained role.
    """

    path: str = ""
    tokenizer: str = ""
    model: dict = dataclasses.field(default_factory=dict)
    dtype: str = ""
    remat: str = "none"
    offload: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        """Refuses misspelt choices."""
        check_choice("dtype", self.dtype, ("", *DTYPES))
        check_choice("remat", self.remat, tuple(REMATS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """A role once its model is known.

    Attributes:
        name: policy, reference, reward, critic, or a user's own.
        config: as the run gave it.
        model: its model.
        eos_ids: ids that end a completion.
        dtype: of matrix products, never empty.
        is_trained: whether a call changes its parameters.
    """

    name: str
    config: RoleConfig
    model: ModelConfig
    eos_ids: tuple[int, ...]
    dtype: str
    is_trained: bool

    def program(self, allocation: Allocation) -> ModelProgram:
        """What a function compiled for one allocation has to know of this model."""
        mesh = make_mesh(allocation)
        return ModelProgram(
            config=self.model,
            dtype=self.dtype,
            remat=self.config.remat,
            partition=partition_for(mesh, options=allocation.options),
            options=allocation.options,
        )

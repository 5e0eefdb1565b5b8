"""A role: whose parameters a call uses, where they come from, how they are computed."""

import dataclasses

from realjax.core.config import check_choice
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import ModelProgram
from realjax.models import quantized
from realjax.models.config import ModelConfig
from realjax.models.transformer import REMATS
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What training decides of the routers of a mixture of experts.

    None leaves what the model's own config says; see `MoEConfig` for the meanings.

    Attributes:
        aux_loss_coef: of the load-balancing loss.
        z_loss_coef: of the mean squared log-normaliser.
        jitter: of the router's input.
        capacity_factor: 0 drops no token.
        drop_policy: "probs" or "position".
    """

    aux_loss_coef: float | None = None
    z_loss_coef: float | None = None
    jitter: float | None = None
    capacity_factor: float | None = None
    drop_policy: str | None = None

    def applied(self, model: ModelConfig) -> ModelConfig:
        """Return the model with these routers.

        Raises:
            ValueError: the model has none.
        """
        fields = dataclasses.asdict(self)
        changes = {name: value for name, value in fields.items() if value is not None}
        if not changes:
            return model
        if model.moe is None:
            raise ValueError(
                f"The role's router has {changes}, and its model (family"
                f" {model.family!r}) has no experts. Remove them."
            )
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One role of a run.

    Attributes:
        path: folder of a Hugging Face checkpoint; empty for a new model.
        family: dotted name of a module of your own that reads it; "" takes the family
            that its config.json names.
        tokenizer: folder of its tokenizer; empty means `path`.
        model: sizes of a new model, by the names of `ModelConfig` (the vocabulary's
            comes from the tokenizer).
        router: of a mixture of experts, where it differs from the model's.
        dtype: of matrix products; "" means bfloat16 on a GPU, float32 elsewhere. A
            role that is trained is not "float16".
        weights: of the matrices of a role that is not trained: "int8" or
            "float8_e4m3fn"; "" is `dtype`. See `models.quantized`.
        remat: what the backward pass computes anew, one of `transformer.REMATS`; ""
            leaves it to the plan, and where that does not say is "none".
        offload: whether what the role keeps waits in host memory between its calls:
            `+offload` in all their allocations.
        optimizer: of a trained role.
    """

    path: str = ""
    family: str = ""
    tokenizer: str = ""
    model: dict = dataclasses.field(default_factory=dict)
    router: RouterConfig = RouterConfig()
    dtype: str = ""
    weights: str = ""
    remat: str = ""
    offload: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        """Refuses misspelt choices."""
        check_choice("dtype", self.dtype, ("", *DTYPES))
        check_choice("weights", self.weights, ("", *quantized.DTYPES))
        check_choice("remat", self.remat, ("", *REMATS))


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

    def __post_init__(self):
        """Refuses a type in which small gradients vanish."""
        if self.is_trained and self.dtype == "float16":
            raise ValueError(
                f"Role {self.name!r} is trained in float16, whose gradients vanish"
                " below 6e-8 without loss scaling, which is not built. Use bfloat16."
            )

    def remat(self, planned: str = "") -> str:
        """What the backward pass computes anew; `planned` is a plan's wish."""
        return self.config.remat or planned or "none"

    def program(self, allocation: Allocation, remat: str = "") -> ModelProgram:
        """What a function compiled for one allocation has to know of this model.

        Args:
            allocation: of the call.
            remat: that the plan wishes; see `RoleConfig.remat`.
        """
        mesh = make_mesh(allocation)
        return ModelProgram(
            config=self.model,
            dtype=self.dtype,
            remat=self.remat(remat),
            partition=partition_for(mesh, options=allocation.options),
            options=allocation.options,
        )

"""A role: whose parameters a call uses, where they come from, how they are computed."""

import dataclasses

from realjax.core.config import check_choice
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import ModelProgram
from realjax.models import lora_files, quantized
from realjax.models.config import ModelConfig
from realjax.models.lora import ALL_LINEAR, with_adapters
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


EXPORTS = ("merged", "adapter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: of a role that is trained, all that is, with a scalar head.

    What they stand beside stays in the role's `dtype`, without a gradient and without
    moments, and only adapters move from one allocation to another.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    Attributes:
        rank: 0 is none; with a `path` it is that of the folder.
        alpha: the product of the two matrices counts alpha / rank times.
        targets: the projections that have one: by our names (`models.config`), by
            those of transformers ("q_proj"), or "all-linear", which is all of them.
        dropout: in training, the share of an adapter's inputs that are zero. With it
            the trainer's log-probabilities are not the sampler's: leave it at 0 where
            the role generates.
        is_rank_stabilized: alpha / sqrt(rank) in the place of alpha / rank.
        path: folder of adapters to start from, in PEFT's layout. It decides rank,
            scale and targets.
        export: "merged" writes a whole model, in which they are added to what they
            stand beside; "adapter" a folder of PEFT's layout.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dropout: float = 0.0
    is_rank_stabilized: bool = False
    path: str = ""
    export: str = "merged"

    def __post_init__(self):
        """Refuses misspelt choices."""
        check_choice("export", self.export, EXPORTS)
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be at least 0.")

    @property
    def is_used(self) -> bool:
        """Whether the role has adapters."""
        return bool(self.rank or self.path)

    def applied(self, model: ModelConfig, base_dtype: str) -> ModelConfig:
        """Return the model with these adapters.

        Args:
            model: of the role.
            base_dtype: of what they stand beside.

        Raises:
            FileNotFoundError, ValueError: as `lora_files.read_adapters` does; a target
                that is not there; a rank that is not that of the folder.
        """
        if not self.is_used:
            return model
        if not self.path:
            return with_adapters(
                model,
                rank=self.rank,
                alpha=self.alpha,
                targets=self.targets,
                dropout=self.dropout,
                is_rank_stabilized=self.is_rank_stabilized,
                base_dtype=base_dtype,
            )
        found = lora_files.read_adapters(self.path, model)
        assert found.adapters is not None
        if self.rank not in (0, found.adapters.rank):
            raise ValueError(
                f"lora.rank is {self.rank}, and the adapters in {self.path} have rank"
                f" {found.adapters.rank}. Leave it at 0 to take theirs."
            )
        adapters = dataclasses.replace(
            found.adapters, dropout=self.dropout, base_dtype=base_dtype
        )
        found = dataclasses.replace(found, adapters=adapters)
        lora_files.check_adapters(self.path, found)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One role of a run.

    Attributes:
        path: folder of a Hugging Face checkpoint; empty for a new model.
        family: dotted name of a module of your own that reads it; "" takes the family
            that its config.json names.
        label: of a sequence classifier with several, the name or number of the one
            whose logit is the score; "" is the only one. See `models.labels`.
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
        lora: adapters, if they are to be trained and nothing else.
    """

    path: str = ""
    family: str = ""
    label: str = ""
    tokenizer: str = ""
    model: dict = dataclasses.field(default_factory=dict)
    router: RouterConfig = RouterConfig()
    dtype: str = ""
    weights: str = ""
    remat: str = ""
    offload: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()

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

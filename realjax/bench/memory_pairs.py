"""Calls and allocations whose memory is predicted, and compiled to see what is true.

Six kinds of programs (prefill and decoding, log-probabilities, scores and values,
gradients, updates), five shapes of models, and all axes of a mesh.
"""

import dataclasses
from typing import Any

from realjax.data.datasets import DataConfig
from realjax.dataflow.plan import CallPlan, ExecutionPlan, planned
from realjax.functions.role import RoleConfig
from realjax.parallel.allocation import Allocation
from realjax.runtime.run import make_graph
from realjax.runtime.run_config import RunConfig

LLAMA: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 128256,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "max_positions": 131072,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA
    | {"width": 2048, "num_layers": 16, "head_dim": 64, "mlp_width": 8192}
    | {"tie_embeddings": True},
    "llama-3.2-3b": LLAMA
    | {"width": 3072, "num_layers": 28, "num_heads": 24, "mlp_width": 8192}
    | {"tie_embeddings": True},
    "llama-2-7b": LLAMA
    | {"width": 4096, "num_layers": 32, "num_kv_heads": 32, "mlp_width": 11008}
    | {"vocab_size": 32000, "rope_theta": 10000.0, "max_positions": 4096},
    "llama-3.1-8b": LLAMA | {"width": 4096, "num_layers": 32, "mlp_width": 14336},
    # Of OLMoE: 64 experts, 8 for each token.
    "moe-1b-7b": LLAMA
    | {"family": "mixtral", "vocab_size": 50304, "width": 2048, "num_layers": 16}
    | {"num_heads": 16, "num_kv_heads": 16, "mlp_width": 1024}
    | {"moe": {"num_experts": 64, "top_k": 8}},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A call on an allocation of eight devices.

    Attributes:
        model: one of `MODELS`.
        call: of PPO.
        allocation: of the call.
        rows: of a microbatch, or completions decoded at the same time, on all devices.
        remat: of a call that trains.
        prompt: tokens of the longest prompt.
        new: tokens of the longest completion.
    """

    model: str
    call: str
    allocation: str
    rows: int
    remat: str = ""
    prompt: int = 1024
    new: int = 1024

    def __str__(self):
        """In one line."""
        return " ".join(filter(None, self.cells))

    @property
    def config(self) -> RunConfig:
        """The run that has the call."""
        role = RoleConfig(model=MODELS[self.model], dtype="bfloat16")
        roles = ("policy", "reference", "reward", "critic")
        return RunConfig(
            algorithm="ppo",
            hp={"sampling": {"max_new_tokens": self.new}},
            roles=dict.fromkeys(roles, role),
            data=DataConfig(
                kind="prompts", max_prompt_length=self.prompt, batch_size=512
            ),
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """Columns of a table."""
        return (self.model, self.call, self.allocation, str(self.rows), self.remat)

    @property
    def plan(self) -> ExecutionPlan:
        """The plan of the call's run; the others are on one device."""
        graph = make_graph(self.config)
        calls = {
            name: CallPlan(allocation=Allocation())
            for name, node in graph.calls.items()
            if node.role is not None
        }
        calls[self.call] = CallPlan(
            allocation=Allocation.parse(self.allocation),
            rows=self.rows,
            remat=self.remat,
        )
        return planned(graph, calls, microbatch_tokens=16384)


def _pair(text: str, rows: int, remat: str = "") -> Pair:
    model, call, allocation = text.split()
    return Pair(model=model, call=call, allocation=allocation, rows=rows, remat=remat)


PAIRS = (
    _pair("llama-3.1-8b rollout d8", 512),
    _pair("llama-2-7b rollout t8", 128),
    _pair("llama-3.2-1b rollout d4t2", 512),
    _pair("llama-3.1-8b rollout f8", 512),
    _pair("moe-1b-7b rollout e8", 256),
    _pair("llama-3.1-8b reference f8", 64),
    _pair("llama-2-7b reference d2t4", 16),
    _pair("llama-3.2-3b reference d8", 64),
    _pair("moe-1b-7b reference e8", 32),
    _pair("llama-2-7b reward d8", 64),
    _pair("llama-3.1-8b value s2t4", 16),
    _pair("llama-3.1-8b train_policy f8", 64, "block"),
    _pair("llama-3.1-8b train_policy t8+sequence", 8, "block"),
    _pair("llama-3.1-8b train_policy f2t4", 16, "dots"),
    _pair("llama-3.2-1b train_policy d8", 32, "none"),
    _pair("llama-3.2-3b train_policy f8+zero1", 64, "block"),
    _pair("llama-2-7b train_policy s2f4", 64, "block"),
    _pair("llama-2-7b train_critic s4t2", 16, "dots"),
    _pair("llama-3.2-3b train_critic d2f2t2", 16, "none"),
    _pair("moe-1b-7b train_policy f2e4", 16, "block"),
)
"""Twenty, on eight devices, which the counting of `planner.working` was written for."""

HELD_OUT = (
    _pair("llama-3.1-8b train_policy f8", 16, "none"),
    _pair("llama-3.1-8b reward f2t4", 32),
    _pair("moe-1b-7b value f2e4", 32),
    _pair("llama-3.2-3b train_policy d2t4", 16, "block"),
    _pair("llama-3.2-1b train_critic d4s2", 64, "block"),
    _pair("llama-2-7b train_policy f4t2+sequence", 16, "dots"),
    _pair("llama-3.1-8b rollout f2t4", 256),
    _pair("moe-1b-7b train_critic e4t2", 16, "dots"),
)
"""Compiled when that was done: nothing was changed for them."""

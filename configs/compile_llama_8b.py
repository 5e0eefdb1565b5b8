"""What PPO with four models of the shape of Llama 3.1 8B needs of eight H200s.

    python -m realjax.cli.compile --config=configs/compile_llama_8b.py --for=h200x8

It is compiled and not run: there are no paths. (`:debug` runs, with tiny models.) A
microbatch has 4 rows of 4096 tokens a device, and a device decodes 4 completions at the
same time; one strategy for everything is set by --config.allocation=t8, rows of a call
by --config.rows.rollout=8.
"""

from ml_collections import ConfigDict

from realjax.algorithms.ppo import PPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.role import RoleConfig
from realjax.rl.sampling import Sampling
from realjax.runtime.run_config import RunConfig
from realjax.testing import TINY

CALLS = ("rollout", "reward", "reference", "value", "train_policy", "train_critic")

# Of the config.json of meta-llama/Llama-3.1-8B.
LLAMA_8B = {
    "family": "llama",
    "vocab_size": 128256,
    "width": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "mlp_width": 14336,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "kind": "llama3",
        "factor": 8.0,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_max_positions": 8192,
    },
    "max_positions": 131072,
    "eos_ids": (128001,),
}


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    role = RoleConfig(model=LLAMA_8B, remat="block", dtype="bfloat16")
    config = config_dict(
        RunConfig(
            algorithm="ppo",
            roles=dict.fromkeys(("policy", "reference", "reward", "critic"), role),
            data=DataConfig(kind="prompts", max_prompt_length=1024, batch_size=256),
            allocation="f8",
            allocations=dict.fromkeys(CALLS, ""),
            rows=dict.fromkeys(CALLS, 32),
            kv_dtype={"rollout": ""},
            weights={"rollout": ""},
        )
    )
    config.hp = config_dict(PPO)
    config.hp.minibatches = 1
    config.hp.sampling = config_dict(Sampling(max_new_tokens=3072))
    if variant == "debug":
        debug(config)
    return config


def debug(config: ConfigDict) -> None:
    """One step of the same calls with tiny models on one device."""
    config.corpus = "reviews"
    for role in config.roles.values():
        role.model, role.dtype = TINY, "float32"
        role.tokenizer = "{workdir}/data/tokenizer"
    config.data.path = "{workdir}/data/prompts_train.jsonl"
    config.data.valid_path = "{workdir}/data/prompts_valid.jsonl"
    config.data.batch_size = config.data.valid_limit = 8
    config.hp.sampling.max_new_tokens = 8
    config.allocation = "d1"
    config.steps = 1

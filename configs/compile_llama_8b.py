"""What PPO with four models of the shape of Llama 3.1 8B needs of eight H200s.

    python -m realjax.cli.compile --config=configs/compile_llama_8b.py --for=h200x8

It is compiled and not run: there are no paths. Training takes 4 rows of 4096 tokens a
device, generation 256 completions at a time on every device. One strategy for
everything: --config.allocation=t8.
"""

from ml_collections import ConfigDict

from realjax.algorithms.ppo import PPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.role import RoleConfig
from realjax.rl.sampling import Sampling
from realjax.runtime.run import RunConfig

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
    check_choice("variant", variant, ("",))
    role = RoleConfig(model=LLAMA_8B, remat="block", dtype="bfloat16")
    config = config_dict(
        RunConfig(
            algorithm="ppo",
            roles=dict.fromkeys(("policy", "reference", "reward", "critic"), role),
            data=DataConfig(kind="prompts", max_prompt_length=1024, batch_size=256),
            allocation="f8",
            allocations=dict.fromkeys(CALLS, ""),
            rows=dict.fromkeys(CALLS, 32),
        )
    )
    config.hp = config_dict(PPO)
    config.hp.minibatches = 1
    config.hp.sampling = config_dict(Sampling(max_new_tokens=3072))
    return config

"""Step 3 of ReaL's tutorial: PPO with four models of Llama 2 7B on eight GPUs.

    python -m realjax.cli.train --config=configs/llama7b_ppo.py \
        --config.paths.policy=FOLDER --config.paths.reward=FOLDER \
        --config.paths.data=FOLDER
    python -m realjax.cli.plan --config=configs/llama7b_ppo.py --cluster=8xh100
    python -m realjax.cli.train --config=configs/llama7b_ppo.py:debug

`paths.policy` is what `llama7b_sft.py` exported, `paths.reward` what
`llama7b_reward_model.py` did; `paths.data` holds train.jsonl and valid.jsonl with
{prompt}. None is needed to plan or compile.

Source of the settings: the scripts of ReaL, arXiv 2406.14088. Its tutorial reports
574 s for 39 steps on eight GPUs, with all completions 512 tokens long: add
--config.hp.sampling.min_new_tokens=512 to compare. Here not measured.
"""

import dataclasses

from ml_collections import ConfigDict

from realjax.algorithms.ppo import PPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.models.families import llama
from realjax.rl.sampling import Sampling
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY

CALLS = ("rollout", "reward", "reference", "value", "train_policy", "train_critic")


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    # What is planned and compiled where there are no checkpoints.
    sizes = dataclasses.asdict(llama.size("2-7b"))
    shared = RoleConfig(model=sizes, dtype="bfloat16")
    role = lambda path, **fields: dataclasses.replace(shared, path=path, **fields)
    # Those of ppo.py: ReaL's default, 1e-5, is one for fine-tuning.
    policy = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    critic = OptimizerConfig(learning_rate=5e-6, schedule="constant")
    config = config_dict(
        RunConfig(
            algorithm="ppo",
            roles={
                "policy": role("{policy}", optimizer=policy),
                "reference": role("{policy}"),
                "reward": role("{reward}"),
                "critic": role("{reward}", optimizer=critic),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompts",
                max_prompt_length=128,
                batch_size=128,
            ),
            allocations=dict.fromkeys(CALLS, ""),
            rows=dict.fromkeys(CALLS, 0),
            kv_dtype={"rollout": ""},
            weights={"rollout": ""},
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=20),
        )
    )
    config.hp = config_dict(PPO)
    # Wider sets than ReaL's default of 200.
    config.hp.sampling = config_dict(
        Sampling(top_k=1000, top_p=0.9, max_new_tokens=512)
    )
    config.paths = ConfigDict({"policy": "", "reward": "", "data": ""})
    if variant == "debug":
        debug(config)
    return config


def debug(config: ConfigDict) -> None:
    """Three steps of tiny models on made data, on two allocations."""
    config.corpus = "reviews"
    config.cpu_devices = 8
    for role in config.roles.values():
        role.path, role.dtype, role.model = "", "", TINY
        role.tokenizer = "{workdir}/data/tokenizer"
    config.data.path = "{workdir}/data/prompts_train.jsonl"
    config.data.valid_path = "{workdir}/data/prompts_valid.jsonl"
    config.data.batch_size = config.data.valid_limit = 16
    config.hp.sampling = config_dict(Sampling(top_k=20, top_p=0.9, max_new_tokens=16))
    config.hp.minibatches = 2
    config.steps = 3
    config.allocation = "f8"
    config.allocations_devices = 8
    config.allocations.rollout = "d4t2"

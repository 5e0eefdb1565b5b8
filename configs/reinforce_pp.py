"""REINFORCE++ with a policy, its reference and a reward model.

    python -m realjax.cli.train --config=configs/reinforce_pp.py \
        --config.paths.policy=FOLDER --config.paths.reward=FOLDER \
        --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/reinforce_pp.py:debug

Models and data are those of grpo.py. The method is that of Hu et al. 2025, arXiv
2501.03262; sizes and rates are ours. Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.reinforce_pp import ReinforcePlusPlus
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.rl.sampling import Sampling
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    config = config_dict(
        RunConfig(
            algorithm="reinforce_pp",
            roles={
                "policy": RoleConfig(path="{policy}", optimizer=optimizer),
                "reference": RoleConfig(path="{policy}"),
                "reward": RoleConfig(path="{reward}"),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompts",
                max_prompt_length=256,
                batch_size=64,
            ),
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=50),
        )
    )
    config.hp = config_dict(ReinforcePlusPlus(sampling=Sampling(max_new_tokens=512)))
    config.paths = ConfigDict({"policy": "", "reward": "", "data": ""})
    if variant == "debug":
        debug(config)
    return config


def debug(config: ConfigDict) -> None:
    """Three steps of tiny models on made data."""
    config.corpus = "reviews"
    config.cpu_devices = 8
    for role in config.roles.values():
        role.path = ""
        role.tokenizer = "{workdir}/data/tokenizer"
        role.model = TINY
    config.data.path = "{workdir}/data/prompts_train.jsonl"
    config.data.valid_path = "{workdir}/data/prompts_valid.jsonl"
    config.data.batch_size = 4
    config.data.valid_limit = 4
    config.hp.sampling.max_new_tokens = 16
    config.steps = 3

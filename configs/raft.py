"""RAFT with a policy and a reward model: fine-tuning on the best of eight completions.

    python -m realjax.cli.train --config=configs/raft.py --config.paths.policy=FOLDER \
        --config.paths.reward=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/raft.py:debug

Models and data are those of grpo.py. The method is that of Dong et al. 2023, arXiv
2304.06767; sizes and rates are ours. Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.raft import RAFT
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
            algorithm="raft",
            roles={
                "policy": RoleConfig(path="{policy}", optimizer=optimizer),
                "reward": RoleConfig(path="{reward}"),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompts",
                max_prompt_length=256,
                batch_size=256,
            ),
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=50),
        )
    )
    config.hp = config_dict(RAFT(sampling=Sampling(max_new_tokens=128)))
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
    config.hp.completions_per_prompt = 4
    config.steps = 3

"""ORPO from pairs of answers, starting from a pretrained language model.

    python -m realjax.cli.train --config=configs/orpo.py \
        --config.paths.policy=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/orpo.py:debug

The data are those of dpo.py. The method is that of Hong et al. 2024, arXiv 2403.07691;
sizes and rates are ours. Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.orpo import ORPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=8e-6, schedule="constant")
    config = config_dict(
        RunConfig(
            algorithm="orpo",
            roles={"policy": RoleConfig(path="{policy}", optimizer=optimizer)},
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="pairs",
                max_length=1024,
                batch_size=64,
            ),
            epochs=1,
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=100),
        )
    )
    config.hp = config_dict(ORPO)
    config.paths = ConfigDict({"policy": "", "data": ""})
    if variant == "debug":
        debug(config)
    return config


def debug(config: ConfigDict) -> None:
    """Three steps of a tiny model on made data."""
    config.corpus = "reviews"
    config.cpu_devices = 8
    config.roles.policy.path = ""
    config.roles.policy.tokenizer = "{workdir}/data/tokenizer"
    config.roles.policy.model = TINY
    config.data.path = "{workdir}/data/pairs_train.jsonl"
    config.data.valid_path = "{workdir}/data/pairs_valid.jsonl"
    config.data.batch_size = 8
    config.data.valid_limit = 8
    config.steps = 3

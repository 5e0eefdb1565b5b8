"""A reward model from pairs of answers, starting from a language model.

    python -m realjax.cli.train --config=configs/reward_model.py \
        --config.paths.model=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/reward_model.py:debug

`paths.data` holds train.jsonl and valid.jsonl with records of {prompt, pos_answers,
neg_answers} or {prompt, chosen, rejected}.

Source of the settings: InstructGPT, arXiv 2203.02155, appendix C.2. Cost and result:
not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.reward_model import RewardModel
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=9e-6, final_fraction=0.1)
    config = config_dict(
        RunConfig(
            algorithm="reward_model",
            roles={
                "reward": RoleConfig(path="{model}", remat="block", optimizer=optimizer)
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="pairs",
                max_length=1024,
                batch_size=64,
            ),
            epochs=1,  # More overfits, says the paper.
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=100),
        )
    )
    config.hp = config_dict(RewardModel)
    config.paths = ConfigDict({"model": "", "data": ""})
    if variant == "debug":
        debug(config)
    return config


def debug(config: ConfigDict) -> None:
    """Three steps of a tiny model on made data."""
    config.corpus = "reviews"
    config.cpu_devices = 8
    config.roles.reward.path = ""
    config.roles.reward.tokenizer = "{workdir}/data/tokenizer"
    config.roles.reward.model = TINY
    config.data.path = "{workdir}/data/pairs_train.jsonl"
    config.data.valid_path = "{workdir}/data/pairs_valid.jsonl"
    config.data.batch_size = 8
    config.data.valid_limit = 8
    config.steps = 3

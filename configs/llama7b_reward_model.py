"""Step 2 of ReaL's tutorial: a reward model of the size of Llama 2 7B on eight GPUs.

    python -m realjax.cli.train --config=configs/llama7b_reward_model.py \
        --config.paths.model=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.plan --config=configs/llama7b_reward_model.py --cluster=8xh100
    python -m realjax.cli.train --config=configs/llama7b_reward_model.py:debug

`paths.model` is what `llama7b_sft.py` exported; `paths.data` holds train.jsonl and
valid.jsonl with records of {prompt, pos_answers, neg_answers}. Neither is needed to
plan or compile.

Source of the settings: the scripts of ReaL, arXiv 2406.14088; the optimizer is its
default, and ours. Its tutorial reports 294 s for 15 steps on eight GPUs. Here not
measured.
"""

import dataclasses

from ml_collections import ConfigDict

from realjax.algorithms.reward_model import RewardModel
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.role import RoleConfig
from realjax.models.families import llama
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    # What is planned and compiled where there is no checkpoint.
    sizes = dataclasses.asdict(llama.size("2-7b"))
    config = config_dict(
        RunConfig(
            algorithm="reward_model",
            roles={"reward": RoleConfig(path="{model}", model=sizes, dtype="bfloat16")},
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="pairs",
                max_length=1024,
                batch_size=512,
            ),
            epochs=2,
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=5),
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
    role = config.roles.reward
    role.path, role.dtype, role.model = "", "", TINY
    role.tokenizer = "{workdir}/data/tokenizer"
    config.data.path = "{workdir}/data/pairs_train.jsonl"
    config.data.valid_path = "{workdir}/data/pairs_valid.jsonl"
    config.data.batch_size = config.data.valid_limit = 8
    config.steps = 3

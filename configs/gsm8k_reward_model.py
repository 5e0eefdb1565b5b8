"""A reward model that tells right from wrong solutions of GSM8K's problems.

    python -m realjax.cli.train --config=configs/gsm8k_reward_model.py \
        --config.paths.folder=FOLDER --config.paths.model=runs/gsm8k/sft/export/policy \
        --workdir=runs/gsm8k/reward_model
    python -m realjax.cli.train --config=configs/gsm8k_reward_model.py:debug

FOLDER holds paired_train.jsonl and paired_valid.jsonl with {prompt, pos_answers,
neg_answers}.

Result with 750 problems for training and 600 pairs of 150 held-out ones, on a CPU in
float32 at commit 6b0a874: held-out accuracy 0.717. GPU: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.reward_model import RewardModel
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=5e-4, warmup_fraction=0.1)
    config = config_dict(
        RunConfig(
            algorithm="reward_model",
            roles={"reward": RoleConfig(path="{model}", optimizer=optimizer)},
            data=DataConfig(
                path="{folder}/paired_train.jsonl",
                valid_path="{folder}/paired_valid.jsonl",
                kind="pairs",
                max_length=512,
                max_pairs=4,
                batch_size=16,
            ),
            epochs=2,
            evaluation=EvaluationConfig(every_steps=20),
        )
    )
    config.hp = config_dict(RewardModel)
    config.paths = ConfigDict({"folder": "", "model": ""})
    if variant == "debug":
        config.corpus = "reviews"
        config.cpu_devices = 8
        config.roles.reward.path = ""
        config.roles.reward.tokenizer = "{workdir}/data/tokenizer"
        config.roles.reward.model = TINY
        config.data.path = "{workdir}/data/pairs_train.jsonl"
        config.data.valid_path = "{workdir}/data/pairs_valid.jsonl"
        config.data.batch_size = config.data.valid_limit = 8
        config.steps = 3
    return config

"""DPO on right and wrong solutions of GSM8K's problems.

    python -m realjax.cli.train --config=configs/gsm8k_dpo.py \
        --config.paths.folder=FOLDER \
        --config.paths.policy=runs/gsm8k/sft/export/policy --workdir=runs/gsm8k/dpo
    python -m realjax.cli.train --config=configs/gsm8k_dpo.py:debug

FOLDER holds paired_train.jsonl and paired_valid.jsonl with {prompt, pos_answers,
neg_answers}.

Result of 30 steps of 4 pairs on a CPU in float32 at commit ded2a2d, after 80 steps of
configs/gsm8k_sft.py: the loss of 32 held-out problems' pairs fell from 0.693 to 0.586,
and their accuracy came to 0.56. GPU: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.dpo import DPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.run_config import RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_fraction=0.1)
    config = config_dict(
        RunConfig(
            algorithm="dpo",
            roles={
                "policy": RoleConfig(path="{policy}", optimizer=optimizer),
                "reference": RoleConfig(path="{policy}"),
            },
            data=DataConfig(
                path="{folder}/paired_train.jsonl",
                valid_path="{folder}/paired_valid.jsonl",
                kind="pairs",
                max_length=512,
                max_pairs=2,
                batch_size=8,
            ),
            steps=30,
        )
    )
    config.hp = config_dict(DPO)
    config.paths = ConfigDict({"folder": "", "policy": ""})
    if variant == "debug":
        config.corpus = "reviews"
        config.cpu_devices = 8
        for role in config.roles.values():
            role.path = ""
            role.tokenizer = "{workdir}/data/tokenizer"
            role.model = TINY
        config.data.path = "{workdir}/data/pairs_train.jsonl"
        config.data.valid_path = "{workdir}/data/pairs_valid.jsonl"
        config.data.valid_limit = 8
        config.steps = 3
    return config

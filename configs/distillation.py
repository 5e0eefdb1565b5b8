"""Distillation of a larger language model into a smaller one, on given answers.

    python -m realjax.cli.train --config=configs/distillation.py \
        --config.paths.policy=FOLDER --config.paths.teacher=FOLDER \
        --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/distillation.py:debug

`paths.policy` is the model that learns, `paths.teacher` one that shares its tokenizer;
`paths.data` holds train.jsonl and valid.jsonl with records of {prompt, answer}. With
`--config.hp.is_on_policy=True --config.data.kind=prompts` the policy learns from what
it samples itself (Agarwal et al. 2024, arXiv 2306.13649).

The settings are ours. Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.distillation import Distillation
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=1e-5, schedule="cosine")
    config = config_dict(
        RunConfig(
            algorithm="distillation",
            roles={
                "policy": RoleConfig(path="{policy}", optimizer=optimizer),
                "teacher": RoleConfig(path="{teacher}"),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompt_answer",
                max_length=1024,
                batch_size=64,
            ),
            epochs=1,
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=100),
        )
    )
    config.hp = config_dict(Distillation)
    config.paths = ConfigDict({"policy": "", "teacher": "", "data": ""})
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
    config.roles.teacher.model = TINY | {"width": 64, "mlp_width": 128}
    config.hp.num_top = 16
    config.data.path = "{workdir}/data/sft_train.jsonl"
    config.data.valid_path = "{workdir}/data/sft_valid.jsonl"
    config.data.batch_size = 8
    config.data.valid_limit = 8
    config.steps = 3

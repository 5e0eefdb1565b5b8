"""Supervised fine-tuning of a Llama on a file of prompts and answers.

    python -m realjax.cli.train --config=configs/sft.py \
        --config.paths.model=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/sft.py:debug

`paths.model` is a Hugging Face folder; `paths.data` holds train.jsonl and valid.jsonl
with records of {prompt, answer} or {prompt, completion}.

Source of the settings: InstructGPT, arXiv 2203.02155, appendix C.1. Cost and result:
not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.sft import SFT
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=1e-5, warmup_fraction=0.03)
    config = config_dict(
        RunConfig(
            algorithm="sft",
            roles={
                "policy": RoleConfig(path="{model}", remat="block", optimizer=optimizer)
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompt_answer",
                max_length=1024,
                batch_size=256,
            ),
            epochs=1,
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=100),
        )
    )
    config.hp = config_dict(SFT)
    config.paths = ConfigDict({"model": "", "data": ""})
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
    config.data.path = "{workdir}/data/sft_train.jsonl"
    config.data.valid_path = "{workdir}/data/sft_valid.jsonl"
    config.data.batch_size = 16
    config.data.valid_limit = 16
    config.steps = 3

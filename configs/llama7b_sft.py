"""Step 1 of ReaL's tutorial: supervised fine-tuning of Llama 2 7B on eight GPUs.

    python -m realjax.cli.train --config=configs/llama7b_sft.py \
        --config.paths.model=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.plan --config=configs/llama7b_sft.py --cluster=8xh100
    python -m realjax.cli.train --config=configs/llama7b_sft.py:debug

`paths.model` is the Hugging Face folder of Llama 2 7B; `paths.data` holds train.jsonl
and valid.jsonl with records of {prompt, answer}. Neither is needed to plan or compile.

Source of the settings: the scripts of ReaL, arXiv 2406.14088; the optimizer is its
default, and ours. Its tutorial reports 628 s on eight GPUs. Here not measured.
"""

import dataclasses

from ml_collections import ConfigDict

from realjax.algorithms.sft import SFT
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
            algorithm="sft",
            roles={"policy": RoleConfig(path="{model}", model=sizes, dtype="bfloat16")},
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompt_answer",
                max_length=1024,
                batch_size=2048,
            ),
            epochs=8,
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=20),
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
    role = config.roles.policy
    role.path, role.dtype, role.model = "", "", TINY
    role.tokenizer = "{workdir}/data/tokenizer"
    config.data.path = "{workdir}/data/sft_train.jsonl"
    config.data.valid_path = "{workdir}/data/sft_valid.jsonl"
    config.data.batch_size = config.data.valid_limit = 16
    config.steps = 3

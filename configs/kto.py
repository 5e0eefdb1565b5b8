"""KTO from answers that are labelled good or bad, from a fine-tuned language model.

    python -m realjax.cli.train --config=configs/kto.py \
        --config.paths.policy=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/kto.py:debug

`paths.policy` is the model to start from, and the reference; `paths.data` holds
train.jsonl and valid.jsonl with records of {prompt, completion, label}, where label is
true or false. `--config.hp.stores_reference=True` computes the reference's
log-probabilities once, before the first step.

The method is that of Ethayarajh et al. 2024, arXiv 2402.01306; sizes and rates are
ours. Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.kto import KTO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    optimizer = OptimizerConfig(learning_rate=5e-7, schedule="constant")
    config = config_dict(
        RunConfig(
            algorithm="kto",
            roles={
                "policy": RoleConfig(path="{policy}", optimizer=optimizer),
                "reference": RoleConfig(path="{policy}"),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="labels",
                max_length=1024,
                batch_size=64,
            ),
            epochs=1,
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=100),
        )
    )
    config.hp = config_dict(KTO)
    config.paths = ConfigDict({"policy": "", "data": ""})
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
    config.data.path = "{workdir}/data/labels_train.jsonl"
    config.data.valid_path = "{workdir}/data/labels_valid.jsonl"
    config.data.batch_size = 8
    config.data.valid_limit = 8
    config.steps = 3

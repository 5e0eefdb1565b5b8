"""GRPO with a policy, its reference and a reward model.

    python -m realjax.cli.train --config=configs/grpo.py --config.paths.policy=FOLDER \
        --config.paths.reward=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/grpo.py:debug

`paths.policy` is a fine-tuned language model, `paths.reward` a reward model that
shares its tokenizer; `paths.data` holds train.jsonl and valid.jsonl with {prompt}. The
docstring of algorithms/grpo.py says which options make Dr. GRPO, DAPO and GSPO of it.

Source of the settings: Shao et al. 2024, arXiv 2402.03300, section 4.2 (64 completions
of each prompt there). Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.grpo import GRPO
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
            algorithm="grpo",
            roles={
                "policy": RoleConfig(path="{policy}", optimizer=optimizer),
                "reference": RoleConfig(path="{policy}"),
                "reward": RoleConfig(path="{reward}"),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompts",
                max_prompt_length=256,
                batch_size=16,
            ),
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=50),
        )
    )
    config.hp = config_dict(
        GRPO(completions_per_prompt=64, sampling=Sampling(max_new_tokens=1024))
    )
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

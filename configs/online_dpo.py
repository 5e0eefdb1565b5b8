"""Online DPO: pairs of the policy's own completions, ranked by a reward model.

    python -m realjax.cli.train --config=configs/online_dpo.py \
        --config.paths.policy=FOLDER --config.paths.reward=FOLDER \
        --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/online_dpo.py:debug

Models and data are those of grpo.py. More completions of a prompt give pairs that lie
farther apart: `--config.hp.completions_per_prompt=8`.

The method is that of Guo et al. 2024, arXiv 2402.04792; sizes and rates are ours. Cost
and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.online_dpo import OnlineDPO
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
    optimizer = OptimizerConfig(learning_rate=5e-7, schedule="constant")
    config = config_dict(
        RunConfig(
            algorithm="online_dpo",
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
                batch_size=128,
            ),
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=50),
        )
    )
    config.hp = config_dict(OnlineDPO(sampling=Sampling(max_new_tokens=128)))
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

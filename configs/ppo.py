"""PPO with a policy, its reference, a reward model and a critic.

    python -m realjax.cli.train --config=configs/ppo.py --config.paths.policy=FOLDER \
        --config.paths.reward=FOLDER --config.paths.data=FOLDER
    python -m realjax.cli.train --config=configs/ppo.py:debug

`paths.policy` is a fine-tuned language model, `paths.reward` a reward model that
shares its tokenizer; `paths.data` holds train.jsonl and valid.jsonl with {prompt}.
The reference starts from the policy, the critic from the reward model.

Hyperparameters are ReaL's defaults. Cost and result: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.ppo import PPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.rl.sampling import Sampling
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY

CALLS = ("rollout", "reward", "reference", "value", "train_policy", "train_critic")


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "debug"))
    policy = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    critic = OptimizerConfig(learning_rate=5e-6, schedule="constant")
    config = config_dict(
        RunConfig(
            algorithm="ppo",
            roles={
                "policy": RoleConfig(path="{policy}", remat="block", optimizer=policy),
                "reference": RoleConfig(path="{policy}", offload=True),
                "reward": RoleConfig(path="{reward}", offload=True),
                "critic": RoleConfig(path="{reward}", remat="block", optimizer=critic),
            },
            data=DataConfig(
                path="{data}/train.jsonl",
                valid_path="{data}/valid.jsonl",
                kind="prompts",
                max_prompt_length=256,
                batch_size=256,
            ),
            allocations=dict.fromkeys(CALLS, ""),
            rows=dict.fromkeys(CALLS, 0),
            kv_dtype={"rollout": ""},
            weights={"rollout": ""},
            checkpoint=CheckpointConfig(every_minutes=30.0),
            evaluation=EvaluationConfig(every_steps=50),
        )
    )
    config.hp = config_dict(PPO)
    config.paths = ConfigDict({"policy": "", "reward": "", "data": ""})
    if variant == "debug":
        debug(config)
    return config


def debug(config: ConfigDict) -> None:
    """Three steps of tiny models on made data, six calls on four allocations."""
    config.corpus = "reviews"
    config.cpu_devices = 8
    for role in config.roles.values():
        role.path = ""
        role.tokenizer = "{workdir}/data/tokenizer"
        role.model = TINY
    config.data.path = "{workdir}/data/prompts_train.jsonl"
    config.data.valid_path = "{workdir}/data/prompts_valid.jsonl"
    config.data.batch_size = 16
    config.data.valid_limit = 16
    config.hp.sampling = config_dict(Sampling(top_k=20, top_p=0.9, max_new_tokens=16))
    config.hp.minibatches = 2
    config.steps = 3
    config.allocations_devices = 8
    config.allocations.rollout = "d2t2@0-3"
    config.allocations.reward = "d2@6-7"
    config.allocations.reference = "d2@4-5"
    config.allocations.value = "f2t2@4-7"
    config.allocations.train_policy = "d2f4"
    config.allocations.train_critic = "f2t2@4-7"

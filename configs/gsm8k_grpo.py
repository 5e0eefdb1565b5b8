"""GRPO on GSM8K's problems, scored by the exact answer or by a reward model.

    python -m realjax.cli.train --config=configs/gsm8k_grpo.py \
        --config.paths.folder=FOLDER \
        --config.paths.policy=runs/gsm8k/sft/export/policy --workdir=runs/gsm8k/grpo
    python -m realjax.cli.train --config=configs/gsm8k_grpo.py:reward \
        --config.paths.reward=runs/gsm8k/reward_model/export/reward …

    python -m realjax.cli.train --config=configs/gsm8k_grpo.py:debug

FOLDER holds prompts.jsonl with {prompt, answer}; the answer is the final number. The
last 256 prompts are held out. `:reward` scores by a reward model, and counts the exact
answers to held-out prompts besides, as pass@1.

Result of 30 steps on a CPU in float32 at commit ded2a2d, after 80 steps of
configs/gsm8k_sft.py, with completions of at most 48 tokens: of 128 completions of 32
held-out problems none was right before and none after, with a KL of 0.7 nats per
completion. The model is far too small to solve the problems. GPU: not measured.
"""

from ml_collections import ConfigDict

from realjax.algorithms.grpo import GRPO
from realjax.core.config import check_choice, config_dict
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.functions.score import RewardFunction
from realjax.rl.sampling import Sampling
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY

EXACT = RewardFunction(fn="realjax.data.verifiers:exact_answer")


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ("", "reward", "debug"))
    has_model = variant == "reward"
    optimizer = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    roles = {
        "policy": RoleConfig(path="{policy}", optimizer=optimizer),
        "reference": RoleConfig(path="{policy}"),
    }
    if has_model:
        roles["reward"] = RoleConfig(path="{reward}")
    config = config_dict(
        RunConfig(
            algorithm="grpo",
            roles=roles,
            data=DataConfig(
                path="{folder}/prompts.jsonl",
                kind="prompts",
                max_prompt_length=128,
                batch_size=8,
                held_out=256,
            ),
            steps=30,
            evaluation=EvaluationConfig(verifier=EXACT if has_model else None),
        )
    )
    config.hp = config_dict(
        GRPO(
            sampling=Sampling(top_k=50, max_new_tokens=128),
            completions_per_prompt=4,
            rewards=() if has_model else (EXACT,),
        )
    )
    config.paths = ConfigDict({"folder": "", "policy": "", "reward": ""})
    if variant == "debug":
        config.corpus = "reviews"
        config.cpu_devices = 8
        for role in config.roles.values():
            role.path = ""
            role.tokenizer = "{workdir}/data/tokenizer"
            role.model = TINY
        config.data.path = "{workdir}/data/prompts_train.jsonl"
        config.data.batch_size = config.data.held_out = 16
        config.hp.sampling.max_new_tokens = 16
        config.hp.completions_per_prompt = 2
        config.hp.rewards = ("realjax.data.verifiers:positive_review",)
        config.steps = 3
    return config

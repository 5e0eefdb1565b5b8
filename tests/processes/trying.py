"""What the processes of `trials_test.py` do."""

import contextlib
import pathlib

from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.score import RewardFunction
from realjax.rl.sampling import Sampling
from realjax.runtime.console import Console
from realjax.runtime.run import prepare
from realjax.runtime.run_config import EvaluationConfig
from realjax.runtime.trainer import Trainer
from tests.runtime import small_runs


def judged_run(folder, workdir, allocation):
    """Trains on answers and lets a reward model and a verifier judge; its metrics."""
    folder = pathlib.Path(folder)
    roles = ("policy", "reference", "reward")
    config = small_runs.sft_config(
        folder,
        allocation=allocation,
        steps=2,
        roles={name: small_runs.new_role(folder, OptimizerConfig()) for name in roles},
        evaluation=EvaluationConfig(
            judge="reward",
            verifier=RewardFunction(
                fn="realjax.data.verifiers:length_at_most",
                options={"maximum": 12, "unit": "characters"},
            ),
            completions_per_prompt=2,
            pass_at=(1, 2),
            sampling=Sampling(max_new_tokens=8),
        ),
    )
    trainer = Trainer(prepare(config), pathlib.Path(workdir), Console(is_quiet=True))
    with contextlib.closing(trainer):
        result = trainer.train()
    return {name: values.tolist() for name, values in result.metrics.items()}

"""A sequence classifier of several labels as the reward role of a run."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from realjax.core.config import to_dataclass
from realjax.models.tensor_files import SINGLE_FILE
from realjax.runtime.run import load_parameters, prepare
from realjax.runtime.run_config import RunConfig
from tests.runtime.small_world import make_world, ppo_config, refusal


def test_a_run_takes_the_label_that_its_role_names(tmp_path):
    world = make_world(tmp_path / "world")
    reward = world / "reward"
    fields = json.loads((reward / "config.json").read_text())
    names = {"0": "helpful", "1": "harmless"}
    (reward / "config.json").write_text(json.dumps(fields | {"id2label": names}))
    tensors = load_file(reward / SINGLE_FILE)
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    save_file(tensors | {"score.weight": rows}, reward / SINGLE_FILE)
    config = ppo_config(world)
    found = refusal(config, tmp_path / "run", world)
    assert "Role 'reward'" in found and "2 labels (helpful, harmless)" in found
    config.roles.reward.label = config.roles.critic.label = "harmles"
    assert "mean 'harmless'" in refusal(config, tmp_path / "run", world)
    for role, label in (("reward", "harmless"), ("critic", "0")):
        config.roles[role].label = label
    for role in config.roles.values():
        role.path = role.path.format(**config.paths)
    values = config.to_dict()
    del values["paths"]
    store = load_parameters(prepare(to_dataclass(RunConfig, values)))
    for role, row in (("reward", rows[1]), ("critic", rows[0])):
        kernel = store.at_home(role)["score"]["kernel"]
        np.testing.assert_array_equal(kernel[:, 0], row)

"""Any graph goes from a search to steps: nothing in the planner names an algorithm."""

import io
from unittest import mock

import jax
import numpy as np
import pytest

from realjax.runtime import trainer
from realjax.runtime.console import Console
from realjax.testing import tiny_tokenizer
from tests.e2e.random_graphs import draw
from tests.runtime.small_world import PROMPTS, write_lines

SMALL, LARGE = (12, 37, 57), range(100, 120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_tokenizer(folder / "tokenizer")
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS] * 4)
    answers = [{"prompt": text, "answer": " and ran"} for text in PROMPTS]
    write_lines(folder / "answers.jsonl", answers * 4)
    return folder


def run(seed, folder, workdir, **options):
    """From a config to two steps, on as many devices as were drawn."""
    algorithm, config, num_devices = draw(seed, folder, **options)
    devices, text = jax.devices()[:num_devices], io.StringIO()
    with (
        mock.patch.object(jax, "devices", lambda *_: devices),
        mock.patch.object(jax, "local_devices", lambda *_, **__: devices),
    ):
        result = trainer.train(
            config,
            workdir,
            algorithm=algorithm,
            console=Console(file=text, width=200),
        )
    return result, algorithm.graph(None), num_devices, text.getvalue()


def check(seed, folder, workdir, **options):
    result, graph, num_devices, text = run(seed, folder, workdir, **options)
    assert result.is_finished
    assert result.metrics["step"].tolist() == [1, 2]
    for name, node in graph.calls.items():
        if node.is_training:
            values = result.metrics[node.function.loss_name]
            assert np.isfinite(values).all(), name
        if node.role is not None:
            assert (result.metrics[f"predicted_s/{name}"] > 0).all()
    assert ("plan: search" in text) == (num_devices > 0)


@pytest.mark.parametrize("seed", SMALL)
def test_a_drawn_graph_is_planned_and_runs(seed, folder, tmp_path):
    check(seed, folder, tmp_path / "run", is_small=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", LARGE)
def test_any_drawn_graph_is_planned_and_runs(seed, folder, tmp_path):
    check(seed, folder, tmp_path / "run")

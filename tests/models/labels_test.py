"""Sequence classifiers of several labels, of which one is the score."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import realjax
from realjax.models import hf, transformer
from realjax.models.labels import label_index, label_names, label_part
from realjax.models.tensor_files import SINGLE_FILE
from realjax.testing import tiny_model
from tests.runtime.small_world import parameters

NAMES = ("helpful", "harmless", "honest")
TOKENS = np.array([[5, 6, 7, 8, 0, 0], [9, 4, 3, 2, 1, 7]], np.int32)
LENGTHS = np.array([4, 6])


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def classifier(request, tmp_path_factory):
    """A folder as transformers writes one with three labels, and its head [3, D]."""
    own = {"positions": "learned", "norm": "layer", "is_gated": False}
    own |= {"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True}
    own |= {"num_kv_heads": 4, "tie_embeddings": True}
    sizes = {"family": request.param} | (own if request.param == "gpt2" else {})
    config = tiny_model(300, head="scalar", **sizes)
    folder = tmp_path_factory.mktemp("models") / request.param
    hf.save(folder, config, parameters(config))
    fields = json.loads((folder / "config.json").read_text())
    fields["id2label"] = {str(i): name for i, name in enumerate(NAMES)}
    fields["label2id"] = {name: i for i, name in enumerate(NAMES)}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = load_file(folder / SINGLE_FILE)
    rows = np.random.default_rng(1).normal(size=(3, config.width)).astype(np.float32)
    save_file(tensors | {"score.weight": rows}, folder / SINGLE_FILE)
    return folder, config, rows


@pytest.mark.parametrize("index", range(3))
def test_a_label_s_logit_at_the_last_token_is_the_score(classifier, index):
    folder, config, rows = classifier
    model = realjax.load(folder, "d1", label=NAMES[index])
    np.testing.assert_array_equal(
        model.parameters["score"]["kernel"][:, 0], rows[index]
    )
    positions = np.broadcast_to(
        np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape
    )
    segments = (positions < LENGTHS[:, None]).astype(np.int32)
    hidden = transformer.hidden_states(
        model.parameters,
        config,
        *map(jnp.asarray, (TOKENS, positions, segments)),
        dtype=jnp.float32,
    )
    last = np.asarray(hidden, np.float64)[np.arange(2), LENGTHS - 1]
    logits = last @ rows.astype(np.float64).T  # [2, 3], as transformers pools them
    found = model.scores(TOKENS, LENGTHS)
    np.testing.assert_allclose(found, logits[:, index], atol=1e-4, rtol=1e-5)


def test_a_label_may_be_given_by_its_number(classifier):
    folder, _, rows = classifier
    loaded = hf.load(folder, label="2")
    np.testing.assert_array_equal(loaded["score"]["kernel"][:, 0], rows[2])


def test_a_head_over_devices_is_the_label_s_row_too(classifier):
    folder, _, _ = classifier
    one, many = (realjax.load(folder, a, label="honest") for a in ("d1", "f2t2@0-3"))
    np.testing.assert_allclose(
        one.scores(TOKENS, LENGTHS), many.scores(TOKENS, LENGTHS), atol=1e-5
    )


def test_what_was_chosen_is_saved_as_a_model_of_one_label(classifier, tmp_path):
    model = realjax.load(classifier[0], "d1", label="harmless")
    model.save(tmp_path / "one")
    again = realjax.load(tmp_path / "one", "d1")
    np.testing.assert_array_equal(
        again.parameters["score"]["kernel"], model.parameters["score"]["kernel"]
    )


def test_several_labels_need_a_choice_and_the_choice_a_label(classifier):
    folder, _, _ = classifier
    with pytest.raises(
        ValueError, match=r"3 labels \(helpful, harm.*Say which.*`label"
    ):
        hf.read_config(folder)
    with pytest.raises(ValueError, match=r"no label 'helpfull'.*mean 'helpful'"):
        hf.read_config(folder, label="helpfull")
    with pytest.raises(ValueError, match="no label '3'"):
        hf.read_config(folder, label="3")


def test_a_head_of_another_number_of_labels_is_refused(classifier, tmp_path):
    folder = shutil.copytree(classifier[0], tmp_path / "copy")
    tensors = load_file(folder / SINGLE_FILE)
    save_file(
        tensors | {"score.weight": tensors["score.weight"][:2]}, folder / SINGLE_FILE
    )
    with pytest.raises(ValueError, match=r"'score.weight' has shape \(2, .*needs \(3,"):
        hf.check(folder, label="honest")


def test_a_language_model_has_no_labels(tmp_path):
    config = tiny_model(300)
    hf.save(tmp_path / "m", config, parameters(config))
    with pytest.raises(ValueError, match=r"'good' was asked for.*LlamaForCausalLM"):
        hf.read_config(tmp_path / "m", label="good")


def test_names_come_in_the_order_of_the_outputs():
    fields = {"id2label": {"10": "k", "2": "c", "0": "a", "1": "b"}}
    assert label_names(fields) == ["a", "b", "c", "k"]
    assert label_names({"num_labels": 1}) == ["LABEL_0"]
    assert label_names({}) == ["LABEL_0", "LABEL_1"]  # As transformers counts.
    scalar = {"architectures": ["GPT2ForSequenceClassification"], "num_labels": 3}
    assert label_index(scalar, "LABEL_1") == 1
    assert label_part(scalar, "LABEL_1") == (0, 1, 3)
    assert label_part(scalar | {"num_labels": 1}, "LABEL_0") is None

"""A model on a mesh: what its methods give does not depend on where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import hf, transformer
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import bytes_per_device
from realjax.runtime.model import load
from realjax.testing import tiny_model, tiny_tokenizer
from tests.runtime.small_world import contents, parameters

VOCAB_SIZE, WIDTH = 64, 12
TOKENS = np.random.default_rng(1).integers(2, VOCAB_SIZE, (3, WIDTH), np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a language model and of a scalar one, without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for head in ("language", "scalar"):
        config = tiny_model(VOCAB_SIZE, head=head)
        hf.save(folder / head, config, parameters(config))
    return folder


@pytest.fixture(scope="module")
def language(folders):
    return load(folders / "language", "d1")


@pytest.fixture(scope="module")
def scalar(folders):
    return load(folders / "scalar", "d1")


def test_logits_are_float32_for_every_token_and_id(language):
    found = language.logits(TOKENS)
    assert found.shape == (3, WIDTH, VOCAB_SIZE) and found.dtype == jnp.float32
    assert language.config.vocab_size == VOCAB_SIZE


def test_logits_are_of_the_tokens_before(language):
    whole = language.logits(TOKENS)
    changed = TOKENS.copy()
    changed[:, 7] = 1
    found = language.logits(changed)
    np.testing.assert_allclose(found[:, :7], whole[:, :7], atol=1e-6)
    assert np.abs(found[:, 7] - whole[:, 7]).max() > 1e-3


def test_packed_sequences_do_not_see_each_other(language):
    # Rows 0 and 1 begin a packed row, after which two places stay empty.
    packed = np.concatenate([TOKENS[0, :6], TOKENS[1, :4], [0, 0]])[None]
    segments = np.array([[1] * 6 + [2] * 4 + [0] * 2])
    found = language.logits(packed.astype(np.int32), segments)
    alone = language.logits(TOKENS)
    np.testing.assert_allclose(found[0, :6], alone[0, :6], atol=1e-5)
    np.testing.assert_allclose(found[0, 6:10], alone[1, :4], atol=1e-5)


def test_scores_are_the_scalars_of_last_tokens_whatever_follows(scalar):
    lengths = [WIDTH, 5, 1]
    found = scalar.scores(TOKENS, lengths)
    assert found.shape == (3,) and found.dtype == jnp.float32
    padded = TOKENS.copy()
    padded[1, 5:], padded[2, 1:] = 3, 3
    np.testing.assert_allclose(scalar.scores(padded, np.array(lengths)), found)
    alone = scalar.scores(TOKENS[1:2, :5], [5])
    np.testing.assert_allclose(alone[0], found[1], atol=1e-6)


def test_values_are_of_the_state_before_each_token(scalar):
    # What a score says after n tokens is the value before token n + 1.
    lengths = [6, 4, 6]
    found = np.asarray(scalar.values(TOKENS, lengths))
    assert found.shape == TOKENS.shape
    np.testing.assert_array_equal(found[:, 0], 0)
    np.testing.assert_array_equal(found[1, 4:], 0)
    for length in (1, 3):
        scores = scalar.scores(TOKENS, [length] * 3)
        np.testing.assert_allclose(found[:, length], scores, atol=1e-6)


def test_a_model_s_role_is_kept_in_its_folder(scalar, tmp_path):
    scalar.role = "critic"
    try:
        scalar.save(tmp_path / "critic")
    finally:
        scalar.role = None
    assert load(tmp_path / "critic", "d1").role == "critic"


@pytest.mark.parametrize("allocation", ["d2t2@4-7", "f2t2@0,2,4,6", None])
def test_an_allocation_changes_where_things_are_and_not_what_they_are(
    folders, language, scalar, allocation
):
    # Three rows divide over none of the meshes: they are padded, and cut again.
    found = load(folders / "language", allocation)
    logits = found.logits(TOKENS)
    assert logits.shape == (3, WIDTH, VOCAB_SIZE)
    np.testing.assert_allclose(logits, language.logits(TOKENS), atol=1e-5)
    scores = load(folders / "scalar", allocation).scores(TOKENS, [4, 5, 6])
    np.testing.assert_allclose(scores, scalar.scores(TOKENS, [4, 5, 6]), atol=1e-5)
    # And each device holds the part that the strategy promises.
    chosen = Allocation.parse(allocation or "d8")
    assert found.allocation == chosen
    abstract = transformer.abstract_parameters(found.config)
    promised = bytes_per_device(abstract, found.mesh)
    leaves = jax.tree.leaves(found.parameters)
    for index in chosen.devices:
        device = jax.devices()[index]
        parts = [
            shard.data.nbytes
            for leaf in leaves
            for shard in leaf.addressable_shards
            if shard.device == device
        ]
        assert sum(parts) == promised


def test_an_allocation_may_be_given_as_an_object(folders):
    chosen = Allocation(tensor=2, devices=(3, 5))
    assert load(folders / "scalar", chosen).allocation == chosen


def test_bfloat16_is_of_the_products_and_not_of_the_parameters(folders, language):
    found = load(folders / "language", "d1", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.parameters)} == {
        "float32"
    }
    logits = found.logits(TOKENS)
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - language.logits(TOKENS)).max()
    assert 0 < difference < 0.1
    assert language.dtype == "float32"


@pytest.mark.parametrize("allocation", ["d1", "f2t2@2-5"])
def test_what_was_saved_is_loaded_again_bit_for_bit(folders, tmp_path, allocation):
    for head in ("language", "scalar"):
        load(folders / head, allocation).save(tmp_path / head)
        found, wanted = contents(tmp_path / head), contents(folders / head)
        assert list(found.values()) == list(wanted.values())


def test_a_tokenizer_is_read_and_saved_where_there_is_one(folders, tmp_path, language):
    assert language.tokenizer is None
    config = tiny_model(300)
    tokenizer = tiny_tokenizer()
    hf.save(tmp_path / "text", config, parameters(config), tokenizer=tokenizer)
    model = load(tmp_path / "text", "d1")
    assert model.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    model.save(tmp_path / "again")
    found = load(tmp_path / "again", "d1").tokenizer
    assert found.fingerprint() == tokenizer.fingerprint()


# -- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("nowhere",), FileNotFoundError, "There is no checkpoint folder"),
        (("",), FileNotFoundError, "it has no config.json"),
        (("language", "d9"), ValueError, "this machine has 8"),
        (("language", "t8"), ValueError, "does not divide num_heads=4"),
        (("language", "q2"), ValueError, "unknown letter 'q'"),
        (("language", "d1", "float23"), ValueError, "Did you mean 'float32'"),
    ],
)
def test_what_cannot_be_loaded_is_refused(folders, arguments, error, text):
    folder, *rest = arguments
    with pytest.raises(error, match=text):
        load(folders / folder, *rest)


def test_a_broken_file_is_refused(folders, tmp_path):
    model = load(folders / "language", "d1")
    model.save(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(tmp_path / "cut")


def test_heads_that_are_not_there_are_refused(language, scalar):
    with pytest.raises(ValueError, match=r"scalar head .* Use `scores`"):
        scalar.logits(TOKENS)
    with pytest.raises(ValueError, match=r"language head .* Use `logits`"):
        language.scores(TOKENS, [1, 1, 1])


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_ids_outside_the_vocabulary_are_refused(language, scalar, token):
    tokens = np.array([[3, token]], np.int32)
    with pytest.raises(ValueError, match=rf"the id {token}, .* has 64 ids"):
        language.logits(tokens)
    with pytest.raises(ValueError, match=f"the id {token}, "):
        scalar.scores(tokens, [2])


@pytest.mark.parametrize("lengths", [[1, 2], [0, 1, 1], [1, 1, WIDTH + 1]])
def test_lengths_that_are_none_are_refused(scalar, lengths):
    with pytest.raises(ValueError, match="each row a length from 1 to 12"):
        scalar.scores(TOKENS, lengths)

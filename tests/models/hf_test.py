"""Checkpoint folders: exact round trips, parts, atomic saving, and clear refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from realjax.models import hf
from realjax.models.config import ModelConfig
from realjax.models.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles
from realjax.models.transformer import Parameter, abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings

CONFIG = ModelConfig(
    vocab_size=20,
    width=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=16,
)
KEY = jax.random.key(0)


def draw(config):
    """Parameters by numpy: nothing here depends on what they are."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda parameter: jnp.asarray(
            generator.normal(size=parameter.shape), "float32"
        ),
        abstract_parameters(config),
        is_leaf=lambda x: isinstance(x, Parameter),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one file, and what is in it; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    parameters = draw(CONFIG)
    hf.save(folder, CONFIG, parameters)
    return folder, parameters


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(saved[0], tmp_path / "copied")


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("head", ("language", "scalar"))
@pytest.mark.parametrize("tie_embeddings", (False, True))
@pytest.mark.parametrize("max_shard_bytes", (10**9, 2000))
def test_what_is_saved_loads_exactly(head, tie_embeddings, max_shard_bytes, tmp_path):
    config = dataclasses.replace(CONFIG, head=head, tie_embeddings=tie_embeddings)
    parameters = draw(config)
    hf.save(tmp_path / "m", config, parameters, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "m" / SINGLE_FILE).exists() == (max_shard_bytes > 2000)
    assert (tmp_path / "m" / INDEX_FILE).exists() == (max_shard_bytes == 2000)
    assert hf.read_config(tmp_path / "m") == config
    assert_equal_trees(hf.load(tmp_path / "m"), parameters)


# On t4 two key heads are replicated; d8 has eight whole copies.
@pytest.mark.parametrize("allocation", ("d8", "f4", "t4@1-4", "d2f2t2"))
def test_every_device_gets_its_part(saved, allocation):
    folder, parameters = saved
    mesh = make_mesh(Allocation.parse(allocation))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    loaded = hf.load(folder, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert_equal_trees(loaded, parameters)


def test_any_dimension_may_be_split(saved):
    # Layers over data, head width (merged with heads in the file) over tensor.
    folder, parameters = saved
    mesh = make_mesh(Allocation.parse("d3t2"))

    def sharding(parameter):
        axes = {"layer": "data", "head_dim": "tensor"}
        spec = PartitionSpec(*(axes.get(name) for name in parameter.axes))
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map(
        sharding,
        abstract_parameters(CONFIG),
        is_leaf=lambda x: isinstance(x, Parameter),
    )
    loaded = hf.load(folder, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert_equal_trees(loaded, parameters)


def test_a_device_reads_no_more_than_its_part(saved, monkeypatch):
    mesh = make_mesh(Allocation.parse("f4t2"))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    num_read = 0
    read = TensorFiles.read

    def count(self, name, box):
        nonlocal num_read
        part = read(self, name, box)
        num_read += part.size
        return part

    monkeypatch.setattr(TensorFiles, "read", count)
    hf.load(saved[0], shardings=shardings)
    # Eight devices, and no part (norms are whole everywhere) is read twice.
    assert num_read == CONFIG.num_parameters


def test_donating_one_loaded_copy_leaves_the_others(saved):
    mesh = make_mesh(Allocation.parse("d8"))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    loaded = hf.load(saved[0], shardings=shardings)
    again = hf.load(saved[0], shardings=shardings)
    spoil = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    jax.block_until_ready(spoil(loaded))
    assert_equal_trees(again, saved[1])


def test_parameters_may_be_stored_and_loaded_in_bfloat16(saved, tmp_path):
    folder, parameters = tmp_path / "short", saved[1]
    hf.save(folder, CONFIG, parameters, dtype=jnp.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    assert_equal_trees(hf.load(folder, dtype=jnp.bfloat16), rounded)
    wide = hf.load(folder)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(wide))
    assert_equal_trees(wide, rounded)


def test_sharded_parameters_are_saved_whole(saved, tmp_path):
    mesh = make_mesh(Allocation.parse("d2f2t2"))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    hf.save(tmp_path / "m", CONFIG, jax.device_put(saved[1], shardings))
    stored, expected = (load_file(f / SINGLE_FILE) for f in (tmp_path / "m", saved[0]))
    jax.tree.map(np.testing.assert_array_equal, stored, expected)


def test_a_language_checkpoint_becomes_a_scalar_model(saved):
    folder, parameters = saved
    mesh = make_mesh(Allocation.parse("f2t2"))
    config = dataclasses.replace(CONFIG, head="scalar")
    shardings = parameter_shardings(abstract_parameters(config), mesh)
    loaded = hf.load(folder, head="scalar", key=KEY, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert_equal_trees(loaded["layers"], parameters["layers"])
    assert "head" not in loaded
    assert 0.005 < float(loaded["score"]["kernel"].std()) < 0.05
    again = hf.load(folder, config=config, key=KEY)
    assert_equal_trees(again, loaded)
    other = hf.load(folder, config=config, key=jax.random.key(1))
    assert not np.array_equal(other["score"]["kernel"], again["score"]["kernel"])


def test_a_new_scalar_head_needs_a_key(saved):
    with pytest.raises(ValueError, match="a new head is drawn, which needs a `key`"):
        hf.load(saved[0], head="scalar")


def test_a_scalar_checkpoint_has_no_language_head(tmp_path):
    config = dataclasses.replace(CONFIG, head="scalar")
    hf.save(tmp_path / "m", config, draw(config))
    with pytest.raises(ValueError, match="scalar head, which cannot score"):
        hf.load(tmp_path / "m", head="language")


class FakeTokenizer:
    def __init__(self, *, fails=False, eos_ids=()):
        self.fails, self.eos_ids = fails, eos_ids

    def save(self, folder):
        if self.fails:
            raise OSError("disk full")
        (folder / "tokenizer.json").write_text("{}")


def test_saving_again_replaces_the_checkpoint(saved, copied):
    twice = jax.tree.map(lambda x: 2 * x, saved[1])
    (copied / "stale.safetensors").write_bytes(b"")
    hf.save(copied, CONFIG, twice, tokenizer=FakeTokenizer())
    assert_equal_trees(hf.load(copied), twice)
    names = {path.name for path in copied.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        "tokenizer.json",
    }
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_save_that_fails_leaves_the_old_checkpoint(saved, copied):
    twice = jax.tree.map(lambda x: 2 * x, saved[1])
    with pytest.raises(OSError, match="disk full"):
        hf.save(copied, CONFIG, twice, tokenizer=FakeTokenizer(fails=True))
    assert_equal_trees(hf.load(copied), saved[1])
    hf.save(copied, CONFIG, twice)
    assert_equal_trees(hf.load(copied), twice)


def test_a_folder_of_something_else_is_not_replaced(saved, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"not empty and holds no config.json"):
        hf.save(tmp_path, CONFIG, saved[1])


def test_what_a_family_cannot_say_is_refused_before_anything_is_written(tmp_path):
    config = dataclasses.replace(CONFIG, norm="gemma")
    with pytest.raises(ValueError, match=r"'llama' cannot say that norm is 'gemma'"):
        hf.save(tmp_path / "m", config, draw(config))
    assert not list(tmp_path.iterdir())


def test_a_project_that_has_a_config_json_is_not_replaced(saved, copied):
    (copied / "sources").mkdir()
    with pytest.raises(FileExistsError, match=r"holds the folder 'sources'"):
        hf.save(copied, CONFIG, saved[1])
    (copied / "sources").rmdir()
    (copied / SINGLE_FILE).unlink()
    with pytest.raises(FileExistsError, match=r"a config.json and no tensors"):
        hf.save(copied, CONFIG, saved[1])


def test_a_file_is_not_replaced_by_a_folder(saved, tmp_path):
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(FileExistsError, match=r"notes is a file; it will not be"):
        hf.save(tmp_path / "notes", CONFIG, saved[1])
    assert (tmp_path / "notes").read_text() == "kept"


def test_saving_to_a_link_replaces_what_it_leads_to_each_time(saved, copied):
    link = copied.with_name("latest")
    link.symlink_to(copied)
    for factor in (2, 3):
        parameters = jax.tree.map(lambda x, factor=factor: factor * x, saved[1])
        hf.save(link, CONFIG, parameters)
        assert_equal_trees(hf.load(copied), parameters)
    names = sorted(path.name for path in copied.parent.iterdir())
    assert link.is_symlink() and names == ["copied", "latest"]


def test_a_missing_folder_or_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder .*nowhere"):
        hf.load(tmp_path / "nowhere")
    (tmp_path / ".killed.old").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is in .*/.killed.old: rename that"):
        hf.load(tmp_path / "killed")
    with pytest.raises(FileNotFoundError, match=r"it has no config.json"):
        hf.load(tmp_path)


def test_ids_that_end_a_text_are_kept_wherever_they_stand(saved, copied):
    path = copied / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7]}))
    config = hf.read_config(copied)
    assert config == dataclasses.replace(CONFIG, eos_ids=(2, 7))
    hf.save(copied, config, saved[1])
    assert json.loads(path.read_text())["eos_token_id"] == [2, 7]
    path.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config.json: .*'eos_token_id'"):
        hf.read_config(copied)


def test_ids_that_end_a_text_for_the_tokenizer_are_kept_for_generation(saved, tmp_path):
    tokenizer = FakeTokenizer(eos_ids=(7, 2))
    config = dataclasses.replace(CONFIG, eos_ids=(2,))
    hf.save(tmp_path / "m", config, saved[1], tokenizer=tokenizer)
    generation = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]


def test_the_stored_type_is_said_to_old_and_new_readers(saved, tmp_path):
    hf.save(tmp_path / "m", CONFIG, saved[1], dtype=jnp.bfloat16)
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (fields["dtype"], fields["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_a_broken_config_is_named(copied):
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        hf.load(copied)
    (copied / "config.json").write_text('{"model_type": "phi"}')
    with pytest.raises(ValueError, match=r"config\.json: Models of type 'phi'"):
        hf.load(copied)


def test_missing_tensor_files_are_named(copied):
    (copied / SINGLE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        hf.load(copied)


def test_a_file_of_the_index_that_is_missing_is_named(saved, tmp_path):
    hf.save(tmp_path / "m", CONFIG, saved[1], max_shard_bytes=2000)
    file = sorted((tmp_path / "m").glob("model-00002*"))[0]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} is missing"):
        hf.load(tmp_path / "m")


def test_an_index_that_is_wrong_about_a_file_is_named(saved, tmp_path):
    hf.save(tmp_path / "m", CONFIG, saved[1], max_shard_bytes=2000)
    path = tmp_path / "m" / INDEX_FILE
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(n for n, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{second} lacks the tensor '{name}'"):
        hf.load(tmp_path / "m")
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not an index"):
        hf.load(tmp_path / "m")


@pytest.mark.parametrize("length", (0, 4, 100, -1))
def test_a_file_that_was_cut_off_is_named(copied, length):
    content = (copied / SINGLE_FILE).read_bytes()
    (copied / SINGLE_FILE).write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole") as found:
        hf.load(copied)
    # The tensor at the end, or the first that is needed if the header is not whole.
    lost = "model.layers.2.post_attention_layernorm.weight"
    last = lost if length == -1 else "lm_head.weight"
    assert f"'{last}'" in str(found.value)


def rewrite(folder, change):
    """Change the dictionary of the tensors of a single file."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(copied):
    rewrite(copied, lambda tensors: tensors.pop(UP))
    with pytest.raises(ValueError, match=f"lacks 1 of 30 tensors .* '{UP}'"):
        hf.load(copied)


def test_an_unknown_tensor_is_named(copied):
    bias = UP.replace("weight", "bias")
    rewrite(copied, lambda tensors: tensors.update({bias: np.zeros(12, np.float32)}))
    with pytest.raises(ValueError, match=f"holds 1 tensors that .* '{bias}'"):
        hf.load(copied)


def test_a_tensor_of_another_shape_is_named(copied):
    rewrite(copied, lambda tensors: tensors.update({UP: tensors[UP][:, :7].copy()}))
    with pytest.raises(ValueError, match=rf"'{UP}' has shape \(16, 7\), .* \(16, 8\)"):
        hf.load(copied)


def test_a_tensor_of_integers_is_refused(copied):
    rewrite(copied, lambda tensors: tensors.update({UP: tensors[UP].astype(np.int8)}))
    with pytest.raises(ValueError, match=f"'{UP}' is stored as I8"):
        hf.load(copied)


def test_what_other_programs_add_is_ignored(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    parameters = draw(config)
    hf.save(tmp_path / "m", config, parameters)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.zeros(2, np.float32)

    rewrite(tmp_path / "m", change)
    assert_equal_trees(hf.load(tmp_path / "m"), parameters)


def test_a_head_that_is_not_the_embedding_it_should_be_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    hf.save(tmp_path / "m", config, draw(config))

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3

    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is another than 'model.em"):
        hf.load(tmp_path / "m")
    scalar = dataclasses.replace(config, head="scalar")
    hf.check(tmp_path / "m", config=scalar)


def test_parameters_of_another_config_are_not_saved(saved, tmp_path):
    config = dataclasses.replace(CONFIG, num_layers=2)
    with pytest.raises(ValueError, match=r"\['key'\]\['kernel'\] has shape \(3, 8,"):
        hf.save(tmp_path / "m", config, saved[1])
    config = dataclasses.replace(CONFIG, head="scalar")
    with pytest.raises(ValueError, match=r"lacks \['score'\]\['kernel'\]"):
        hf.save(tmp_path / "m", config, saved[1])
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ValueError, match=r"\['head'\]\['kernel'\], which its config"):
        hf.save(tmp_path / "m", config, saved[1])
    assert not list(tmp_path.iterdir())

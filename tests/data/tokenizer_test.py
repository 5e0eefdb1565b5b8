"""Tests of `realjax/data/tokenizer.py`."""

import json
import subprocess
import sys

import pytest

from realjax.data.tokenizer import Tokenizer

TEXTS = ["The kettle arrived on Monday.", "The lamp arrived on Friday."] * 20
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_training_gives_exactly_the_vocabulary_asked_for(tokenizer):
    assert tokenizer.vocab_size == 300
    # Two texts have far fewer frequent pairs than 700 places.
    large = Tokenizer.train(TEXTS, 1000)
    assert large.vocab_size == 1000
    assert large.decode([999]).startswith("<unused")
    assert large.encode(TEXTS[0]) != []


def test_special_tokens_come_first_and_have_their_roles(tokenizer):
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (0,), 1)
    other = Tokenizer.train(TEXTS, 300, special=("</s>",))
    assert other.decode([0], skip_special_tokens=False) == "</s>"
    assert other.pad_id == other.eos_id == 0


@pytest.mark.parametrize("text", ["", "The kettle", "  two\n\nlines ", "naïve — 猫 🐈"])
def test_decode_undoes_encode_for_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encode_adds_no_special_tokens(tokenizer):
    ids = tokenizer.encode("The kettle")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, 0]) == "The kettle"
    assert tokenizer.decode([*ids, 0], skip_special_tokens=False) == "The kettle<eos>"


def test_a_batch_of_texts_is_encoded_as_each_alone(tokenizer):
    texts = ["The lamp", "", "arrived on Monday"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert (again.eos_ids, again.pad_id) == (tokenizer.eos_ids, tokenizer.pad_id)
    assert not (tmp_path / "saved/generation_config.json").exists()


def test_truncation_and_padding_saved_in_a_folder_are_not_applied(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    path.write_text(json.dumps(saved))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.encode_batch(TEXTS[:2]) == tokenizer.encode_batch(TEXTS[:2])
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_fingerprints_tell_tokenizers_apart(tokenizer):
    assert Tokenizer.train(TEXTS, 300).fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.train(TEXTS, 301).fingerprint() != tokenizer.fingerprint()
    assert Tokenizer.train(["zz top"], 300).fingerprint() != tokenizer.fingerprint()


def test_training_is_the_same_in_another_process(tokenizer):
    program = (
        "from realjax.data.tokenizer import Tokenizer\n"
        f"print(Tokenizer.train({TEXTS!r}, 300).fingerprint())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == tokenizer.fingerprint()


def test_all_ids_that_end_a_completion_are_found_and_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [260, 0, 261]}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == (0, 260, 261)  # its own first
    assert loaded.fingerprint() == tokenizer.fingerprint()
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").eos_ids == (0, 260, 261)
    config.write_text(json.dumps({"eos_token_id": 260}))
    assert Tokenizer.load(tmp_path).eos_ids == (0, 260)


def test_conversations_go_through_the_chat_template(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 300, chat_template=TEMPLATE)
    tokenizer.save(tmp_path)
    for each in (tokenizer, Tokenizer.load(tmp_path)):
        assert each.has_chat_template
        messages = [{"role": "user", "content": "Kettle?"}]
        rendered = "<user>Kettle?<eos>\n<assistant>"
        assert each.render_chat(messages, add_generation_prompt=True) == rendered
        ids = each.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == each.encode(rendered)
        assert each.eos_id in ids
    with pytest.raises(ValueError, match=r"refuses the conversation .* no tools here"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}])


def test_a_conversation_without_a_template_is_refused(tokenizer):
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_missing_and_broken_folders_say_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer folder .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "?"}}))
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 258"):
        Tokenizer.train(TEXTS, 257)

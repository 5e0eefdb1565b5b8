"""Makes the stored numbers of llama_test.py with PyTorch and transformers.

Neither is part of this project: run it in an environment of its own, with Python 3.11,
from the root of the repository, after make_exports.py:

    python3.11 -m venv parity-environment
    parity-environment/bin/pip install torch==2.13.0 transformers==5.23.0
    .venv/bin/python -m tests.parity.make_exports
    parity-environment/bin/python tests/parity/make_llama.py

For each checkpoint it stores, in NAME.npz beside the folder NAME: `tokens` [2, 24],
`logits` [2, 24, V] or `scalars` [2, 24] (float32), and for language models `greedy`
[2, 16], the tokens that transformers' `generate` appends to the first 8. The
checkpoints made here are random and of awkward shapes; those in the folders
`exported_*` were written by realjax, and transformers says what they compute.
"""

import pathlib
import shutil

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

DATA = pathlib.Path(__file__).parent / "data"

COMMON = {
    # Large enough that a wrong scale, order or mask moves every logit.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that positions up to 24 meet all three ranges of frequencies.
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
CONFIGS = {
    # 6 heads of width 10 in a model of width 24, sharing 3 key heads.
    "hf_untied": LlamaConfig(
        **COMMON,
        vocab_size=131,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        rope_parameters=LLAMA3_ROPE,
        rms_norm_eps=1e-5,
    ),
    # 5 heads on a single key head; the embedding is the head.
    "hf_tied": LlamaConfig(
        **COMMON,
        vocab_size=97,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=6,
        tie_word_embeddings=True,
        rope_parameters=LINEAR_ROPE,
    ),
    "hf_scalar": LlamaConfig(
        **COMMON,
        vocab_size=61,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
    ),
}


def make_checkpoint(name: str) -> None:
    """Save a random model; its norms too are random."""
    config = CONFIGS[name]
    is_scalar = name == "hf_scalar"
    model = (LlamaForSequenceClassification if is_scalar else LlamaForCausalLM)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    shutil.rmtree(DATA / name, ignore_errors=True)
    model.float().save_pretrained(DATA / name)


@torch.no_grad()
def store_numbers(folder: pathlib.Path) -> None:
    """Run a checkpoint folder, loaded by its architecture's automatic class."""
    is_scalar = "scalar" in folder.name
    automatic = (
        AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    )
    model = automatic.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = np.random.default_rng(len(folder.name))
    tokens = generator.integers(1, model.config.vocab_size, size=(2, 24))
    ids = torch.from_numpy(tokens)
    numbers = {"tokens": tokens.astype(np.int32)}
    if is_scalar:
        numbers["scalars"] = model.score(model.model(ids)[0])[..., 0].numpy()
        # What the class itself returns is the scalar of the last token.
        np.testing.assert_allclose(
            model(ids).logits[:, 0].numpy(), numbers["scalars"][:, -1], atol=1e-5
        )
    else:
        numbers["logits"] = model(ids).logits.numpy()
        generated = model.generate(
            ids[:, :8],
            attention_mask=torch.ones_like(ids[:, :8]),
            max_new_tokens=16,
            do_sample=False,
        )
        numbers["greedy"] = generated[:, 8:].numpy().astype(np.int32)
    np.savez_compressed(folder.with_suffix(".npz"), **numbers)
    spread = numbers.get("logits", numbers.get("scalars")).std()
    print(f"{folder.name}: spread {spread:.2f}")


def main() -> None:
    """Make the checkpoints, then run them and the exported ones."""
    for seed, name in enumerate(CONFIGS):
        torch.manual_seed(seed)
        make_checkpoint(name)
    for file in sorted(DATA.glob("*/config.json")):
        store_numbers(file.parent)


if __name__ == "__main__":
    main()

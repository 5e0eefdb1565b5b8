"""Makes the stored numbers of families_test.py with PyTorch and transformers.

Neither is part of this project: run it in the environment of make_llama.py, from the
root of the repository, after make_exports.py:

    .venv/bin/python -m tests.parity.make_exports
    parity-environment/bin/python tests/parity/make_families.py [NAME ...]

For each checkpoint it stores, in data/families/NAME.npz beside the folder NAME:
`tokens` [2, 24], `logits` [2, 24, V] or `scalars` [2, 24] (float32), and for language
models `greedy` [2, 64], the tokens that transformers' `generate` appends to the first
8. The checkpoints made here are random and of awkward shapes; those in the folders
`exported_*` were written by realjax, and transformers says what they compute. Tokens
are drawn anew until no two best logits of a continuation are closer than 1e-3, no logit
moves by more than 2e-5 when the model is float64, and a continuation does not repeat
itself all along: what another implementation rounds otherwise changes no token and no
choice of experts, and what it gets wrong does.
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

DATA = pathlib.Path(__file__).parent / "data" / "families"
PROMPT, LENGTH, NEW_TOKENS = 8, 24, 64

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SMALL = {
    **IDS,
    "hidden_size": 16,
    "intermediate_size": 19,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
# Shorter than the texts: positions on both sides of it.
ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "factor": 6.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.5],
    "long_factor": [1.0, 2.0, 3.5, 5.0, 7.5],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 6.0,
    "original_max_position_embeddings": ORIGINAL,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2_plain": GPT2Config(
        **IDS, vocab_size=67, n_embd=18, n_layer=2, n_head=3, n_positions=80
    ),
    # Another width and activation in the feed-forward layer, a head of its own.
    "gpt2_scaled": GPT2Config(
        **IDS,
        vocab_size=53,
        n_embd=15,
        n_layer=3,
        n_head=3,
        n_inner=22,
        n_positions=96,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    ),
    "llama_dynamic": LlamaConfig(
        **(SMALL | {"max_position_embeddings": ORIGINAL}),
        vocab_size=61,
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    ),
    "llama_yarn": LlamaConfig(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 6}),
        vocab_size=59,
        num_key_value_heads=3,
        head_dim=10,
        tie_word_embeddings=True,
        rope_parameters=YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    ),
    "llama_longrope": LlamaConfig(
        **SMALL,
        vocab_size=57,
        num_key_value_heads=2,
        head_dim=10,
        rope_parameters=LONGROPE,
    ),
    "mistral_window": MistralConfig(
        **(SMALL | {"hidden_size": 24, "intermediate_size": 17}),
        vocab_size=55,
        num_key_value_heads=1,
        sliding_window=7,
    ),
    "mistral_full": MistralConfig(
        **(SMALL | {"hidden_size": 15, "num_attention_heads": 3}),
        vocab_size=63,
        num_key_value_heads=3,
        head_dim=8,
        sliding_window=None,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
    ),
    "mixtral_full": MixtralConfig(
        **(
            SMALL
            | {"hidden_size": 18, "intermediate_size": 11, "num_attention_heads": 6}
        ),
        vocab_size=51,
        num_key_value_heads=3,
        head_dim=6,
        num_local_experts=5,
        num_experts_per_tok=2,
        router_jitter_noise=0.1,
    ),
    "mixtral_window": MixtralConfig(
        **(SMALL | {"intermediate_size": 9}),
        vocab_size=49,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=3,
        sliding_window=6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # Only the last two layers look through a window.
    "qwen2_window": Qwen2Config(
        **(SMALL | {"hidden_size": 16, "num_hidden_layers": 3}),
        vocab_size=71,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen2_yarn": Qwen2Config(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 3}),
        vocab_size=73,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
    "qwen3_plain": Qwen3Config(
        **SMALL, vocab_size=69, num_key_value_heads=1, head_dim=10
    ),
    "qwen3_window": Qwen3Config(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 6}),
        vocab_size=47,
        num_key_value_heads=3,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    ),
    "qwen3_moe_normalized": Qwen3MoeConfig(
        **SMALL,
        vocab_size=43,
        num_key_value_heads=1,
        head_dim=10,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=11,
        norm_topk_prob=True,
    ),
    "qwen3_moe_window": Qwen3MoeConfig(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 6}),
        vocab_size=45,
        num_key_value_heads=3,
        head_dim=6,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=13,
        norm_topk_prob=False,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        tie_word_embeddings=True,
    ),
    "gemma_tied": GemmaConfig(
        **SMALL, vocab_size=65, num_key_value_heads=1, head_dim=10
    ),
    "gemma_untied": GemmaConfig(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 3}),
        vocab_size=41,
        num_key_value_heads=3,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma2_capped": Gemma2Config(
        **(SMALL | {"num_hidden_layers": 3}),
        vocab_size=62,
        num_key_value_heads=1,
        head_dim=10,
        query_pre_attn_scalar=7,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=9.0,
    ),
    "gemma2_uncapped": Gemma2Config(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 6}),
        vocab_size=39,
        num_key_value_heads=3,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=11,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
    ),
    "gemma3_scaled": Gemma3TextConfig(
        **(SMALL | {"num_hidden_layers": 4, "intermediate_size": 17}),
        vocab_size=58,
        num_key_value_heads=1,
        head_dim=10,
        query_pre_attn_scalar=11,
        sliding_window=5,
        layer_types=[
            *("sliding_attention",) * 2,
            "full_attention",
            "sliding_attention",
        ],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "linear",
                "rope_theta": 2000.0,
                "factor": 8.0,
            },
        },
    ),
    "gemma3_capped": Gemma3TextConfig(
        **(SMALL | {"hidden_size": 18, "num_attention_heads": 6}),
        vocab_size=37,
        num_key_value_heads=3,
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=9,
        sliding_window_pattern=2,
        final_logit_softcapping=7.0,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
}


@torch.no_grad()
def make_checkpoint(name: str) -> None:
    """Save a random model: matrices of deviation 0.3, norms and biases random too.

    So large that a wrong scale, order or mask moves every logit.
    """
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).float()
    middle = 0.0 if name.startswith("gemma") else 1.0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.uniform_(-0.5, 0.5)
        elif "norm" in parameter_name or ".ln_" in parameter_name:
            parameter.uniform_(middle - 0.5, middle + 0.5)
        elif "embed" in parameter_name and name.startswith("gemma"):
            parameter.normal_(0.0, 0.1)  # They multiply it by sqrt(width).
        else:
            parameter.normal_(0.0, 0.3)
    shutil.rmtree(DATA / name, ignore_errors=True)
    model.save_pretrained(DATA / name)


def load(folder: pathlib.Path) -> PreTrainedModel:
    """Load a folder by its automatic class, all of it and nothing else."""
    automatic = (
        AutoModelForSequenceClassification
        if "scalar" in folder.name
        else AutoModelForCausalLM
    )
    model, loading = automatic.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loading.values()), f"{folder.name}: {loading}"
    return model.eval()


@torch.no_grad()
def scalars(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Score every token; what the class itself returns is the last one's."""
    hidden = getattr(model, model.base_model_prefix)(ids)[0]
    all_scalars = model.score(hidden)[..., 0]
    torch.testing.assert_close(
        model(ids).logits[:, 0], all_scalars[:, -1], atol=1e-5, rtol=0
    )
    return all_scalars


@torch.no_grad()
def language_numbers(folder: pathlib.Path, ids: torch.Tensor) -> dict | None:
    """Return logits and continuation, or None where rounding could change them.

    Every call has a model of its own: with "dynamic" rotary scaling one remembers the
    longest text it has seen.
    """
    logits = load(folder)(ids).logits
    exact = load(folder).double()(ids).logits
    generated = load(folder).generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones_like(ids[:, :PROMPT]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(generated.logits).topk(2).values
    gap = (best[..., 0] - best[..., 1]).min().item()
    error = (logits - exact).abs().max().item()
    greedy = generated.sequences[:, PROMPT:]
    assert greedy.shape == (2, NEW_TOKENS)
    variety = min(len(row.unique()) for row in greedy)
    print(
        f"{folder.name}: spread {logits.std():.2f}, float64 differs {error:.1e},"
        f" smallest gap {gap:.1e}, {variety} different tokens"
    )
    # Exports are here for their names and fields; the others for the arithmetic too.
    needed = 2 if folder.name.startswith("exported") else 6
    if gap < 1e-3 or error > 2e-5 or variety < needed:
        return None
    return {"logits": logits.numpy(), "greedy": greedy.numpy().astype(np.int32)}


def store_numbers(folder: pathlib.Path) -> None:
    """Run a checkpoint folder on the first tokens that suit."""
    model = load(folder)
    for seed in range(100):
        generator = np.random.default_rng(seed)
        tokens = generator.integers(1, model.config.vocab_size, size=(2, LENGTH))
        ids = torch.from_numpy(tokens)
        if "scalar" in folder.name:
            numbers = {"scalars": scalars(model, ids).numpy()}
            print(f"{folder.name}: spread {numbers['scalars'].std():.2f}")
        else:
            numbers = language_numbers(folder, ids)
        if numbers is not None:
            numbers["tokens"] = tokens.astype(np.int32)
            np.savez_compressed(folder.with_suffix(".npz"), **numbers)
            return
    raise ValueError(f"{folder.name}: no tokens suit; change its config.")


def main(names: list[str]) -> None:
    """Make the checkpoints, then run them and the exported ones."""
    for seed, name in enumerate(CONFIGS):
        if not names or name in names:
            torch.manual_seed(seed)
            make_checkpoint(name)
    for folder in sorted(path for path in DATA.iterdir() if path.is_dir()):
        if not names or folder.name in names:
            store_numbers(folder)


if __name__ == "__main__":
    main(sys.argv[1:])

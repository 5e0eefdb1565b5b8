"""Makes the stored adapters and numbers of peft_test.py with PyTorch and PEFT.

Neither is part of this project: run it in the environment of make_llama.py, from the
root of the repository:

    parity-environment/bin/pip install peft==0.21.2
    parity-environment/bin/python tests/parity/make_peft.py

For each checkpoint of `BASES`, stored there by make_llama.py or make_families.py, it
stores in data/peft/NAME a folder of random adapters as PEFT writes it, and in NAME.npz
beside it `tokens` [2, 24] and what the model with the adapters computes: `logits`
[2, 24, V], or `scalars` [2] at the last tokens.
"""

import pathlib
import shutil

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

DATA = pathlib.Path(__file__).parent / "data"
BASES = {
    # Folder, and what is asked of PEFT.
    "llama": ("hf_tied", {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    "qwen2": (
        "families/qwen2_window",
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    ),
    "gpt2": (
        "families/gpt2_plain",
        {
            **{"r": 2, "lora_alpha": 7, "use_rslora": True, "fan_in_fan_out": True},
            "target_modules": ["c_attn", "c_fc", "attn.c_proj"],
        },
    ),
    "scalar": (
        "hf_scalar",
        {"r": 2, "lora_alpha": 2, "target_modules": ["k_proj", "down_proj", "o_proj"]},
    ),
}


@torch.no_grad()
def make(name: str) -> None:
    """Store adapters of deviation 0.3 beside one checkpoint, and its numbers."""
    base, asked = BASES[name]
    is_scalar = "scalar" in base
    automatic = (
        AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    )
    model = automatic.from_pretrained(
        DATA / base, dtype=torch.float32, attn_implementation="eager"
    )
    task = "SEQ_CLS" if is_scalar else "CAUSAL_LM"
    model = get_peft_model(model, LoraConfig(task_type=task, **asked)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in parameter_name or "score" in parameter_name
            parameter.normal_(0.0, 0.3)
    model.peft_config["default"].base_model_name_or_path = base
    folder = DATA / "peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tokens = torch.randint(2, model.config.vocab_size, (2, 24))
    found = model(tokens).logits
    numbers = {"scalars": found[:, 0]} if is_scalar else {"logits": found}
    np.savez_compressed(
        DATA / "peft" / f"{name}.npz",
        tokens=tokens.numpy().astype(np.int32),
        **{key: value.numpy() for key, value in numbers.items()},
    )
    print(name, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in BASES:
        make(each)

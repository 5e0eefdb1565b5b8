"""Generates with PyTorch and transformers when asked to, and says how long it took.

Neither is part of this project; `realjax.bench.hf_rival` runs this under an interpreter
of another environment (see make_llama.py for how to make one):

    python serve_generate.py FOLDER NEW_TOKENS DTYPE

FOLDER holds `model`, a checkpoint, and `prompts.npy` [B, P]. Each line of standard
input names a cache, "dynamic" or "static", and gets a line of JSON with "seconds"; the
tokens [B, P + NEW_TOKENS] are then in FOLDER/NAME.npy.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
import transformers


def main(folder: pathlib.Path, new_tokens: int, dtype: str) -> None:
    """Answers until there is nothing more to read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, dtype)
    )
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # All rows have one length.
    model.generation_config.pad_token_id = 0
    prompts = torch.from_numpy(np.load(folder / "prompts.npy")).long().to(device)
    answer(
        torch=torch.__version__,
        transformers=transformers.__version__,
        torch_threads=torch.get_num_threads(),
        torch_device=device,
        attention=model.config._attn_implementation,
    )
    for line in sys.stdin:
        name = line.strip()
        options = {"cache_implementation": "static"} if name == "static" else {}
        begin = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=new_tokens,
                **options,
            )
        found = tokens.cpu()
        seconds = time.perf_counter() - begin
        np.save(folder / f"{name}.npy", found.numpy())
        answer(seconds=seconds)


def answer(**values: object) -> None:
    """One line of JSON; nothing else may stand on the standard output."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

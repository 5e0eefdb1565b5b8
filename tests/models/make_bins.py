"""Makes the .bin files of torch_files_test.py with PyTorch.

PyTorch is no part of this project: run it in an environment of its own, with Python
3.11, from the root of the repository:

    python3.11 -m venv parity-environment
    parity-environment/bin/pip install torch==2.13.0 numpy safetensors
    parity-environment/bin/python tests/models/make_bins.py

`tensors.bin` holds one tensor of every kind that a state_dict may hold, and
`tensors.npz` what is in those of floats, as float64; `old.bin` is of the format before
PyTorch 1.6. `sharded/` and `single/` are the tensors of the checkpoint `hf_scalar` of
the parity tests, in two files with an index and in one, without their config.
"""

import collections
import json
import pathlib
import shutil

import numpy as np
import torch
from safetensors.torch import load_file

DATA = pathlib.Path(__file__).parent / "data"
CHECKPOINT = pathlib.Path(__file__).parents[1] / "parity/data/hf_scalar"


def tensors() -> dict[str, torch.Tensor]:
    """One of every kind."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 7, generator=generator)
    return collections.OrderedDict(
        float64=matrix.double(),
        float32=matrix,
        float16=matrix.half(),
        bfloat16=matrix.bfloat16(),
        transposed=matrix.half().t(),
        rows_of_another=matrix[1:4],
        every_second_column=matrix[:, ::2],
        repeated=matrix[:1].expand(3, 7),
        parameter=torch.nn.Parameter(matrix + 1),
        vector=matrix[0].clone(),
        number=torch.tensor(2.5),
        nothing=torch.zeros(0, 3),
        flags=matrix > 0,
        counts=torch.arange(6).reshape(2, 3),
        float8=matrix.to(torch.float8_e4m3fn),
    )


def main() -> None:
    """Write everything."""
    DATA.mkdir(exist_ok=True)
    torch.save(tensors(), DATA / "tensors.bin")
    floats = {
        name: tensor.detach().double().numpy()
        for name, tensor in tensors().items()
        if tensor.dtype.is_floating_point and name != "float8"
    }
    np.savez_compressed(DATA / "tensors.npz", **floats)
    old = {"weight": torch.ones(2)}
    torch.save(old, DATA / "old.bin", _use_new_zipfile_serialization=False)
    checkpoint = load_file(CHECKPOINT / "model.safetensors")
    for folder in ("single", "sharded"):
        shutil.rmtree(DATA / folder, ignore_errors=True)
        (DATA / folder).mkdir()
    torch.save(checkpoint, DATA / "single/pytorch_model.bin")
    names = sorted(checkpoint)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        weight_map |= dict.fromkeys(half, file)
        torch.save({name: checkpoint[name] for name in half}, DATA / "sharded" / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (DATA / "sharded/pytorch_model.bin.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()

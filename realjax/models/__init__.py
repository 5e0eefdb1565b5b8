"""Language and scalar-head transformers over plain trees of parameters.

Reading order: `config` (with `rope_scaling`), `axes`, `partition`, `transformer`,
`block`, `attention`, `mlp`, `norm`, `projection`, `rotary`, `moe`, `experts`, `pages`,
`heads`, `parameters`. Then, for checkpoints, `hf`: `families` and `layout` say which
tensor is which leaf, `tensor_files`, `torch_files` and `byte_ranges` read, `streaming`
fills shardings, `gathering`, `tensor_writer` and `new_folder` write, `tensor_checks`
refuses, and `conversion` is the work of `realjax.cli.convert`.
"""

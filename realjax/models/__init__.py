"""Language and scalar-head transformers over plain trees of parameters.

Reading order: `config`, `axes`, `transformer`, `attention`, `mlp`, `norm`,
`projection`, `rotary`, `cache`, `heads`; then, for checkpoints, `hf` with `layout`,
`tensor_files` and `families`.
"""

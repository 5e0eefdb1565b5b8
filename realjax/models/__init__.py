"""Language and scalar-head transformers over plain trees of parameters.

Reading order: `config`, `transformer`, `attention`, `mlp`, `norm`, `rotary`, `cache`,
`heads`; then `hf`, with `layout`, `tensor_files` and `families`, for checkpoints.
"""

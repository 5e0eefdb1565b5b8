"""One file per algorithm: hyperparameters, arithmetic, losses, graph.

`config.algorithm = "ppo"` means the module `realjax.algorithms.ppo`. A module is an
algorithm when it has `graph(hp) -> DataflowGraph` and a frozen dataclass of
hyperparameters named by `HYPERPARAMETERS`; one's own is passed in the same way.
"""

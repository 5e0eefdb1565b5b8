"""How long sequences of a graph can be."""

from collections.abc import Mapping, Sequence

from realjax.data.datasets import Dataset
from realjax.dataflow.graph import DataflowGraph
from realjax.functions.function import Generate
from realjax.functions.role import Role


def sequence_width(
    graph: DataflowGraph,
    roles: Mapping[str, Role],
    datasets: Sequence[Dataset],
    *,
    sampling: str = "config.hp.sampling",
) -> int:
    """T: tokens of the longest sequence that a graph can meet, rounded up to 8.

    Args:
        graph: whose calls sample, or read what the data sets hold.
        roles: that must take such sequences.
        datasets: of prompts, or of whole sequences.
        sampling: where the config says how long completions are, for the error.

    Raises:
        ValueError: a role was made for fewer.
    """
    generated = [
        node.function.sampling.max_new_tokens
        for node in graph.calls.values()
        if isinstance(node.function, Generate)
    ]
    if generated:
        width = max(dataset.prompt_width for dataset in datasets) + max(generated)
        advice = f"config.data.max_prompt_length or {sampling}.max_new_tokens"
    else:
        width = max(dataset.row_width for dataset in datasets)
        advice = "config.data.max_length"
    for name, role in roles.items():
        # Widths of data sets are rounded up to 8 themselves.
        longest = role.model.longest_sequence(is_sampled=bool(generated))
        if width > _round_up(longest):
            raise ValueError(
                f"Sequences reach {width} tokens, and role {name!r} was made for "
                f"{longest}. Lower {advice}."
            )
    return _round_up(width)


def _round_up(width: int) -> int:
    return -(-width // 8) * 8

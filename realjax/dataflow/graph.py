"""The dataflow graph: model function calls joined by the keys they share."""

import dataclasses
from collections.abc import Mapping

from realjax.functions.function import Follow, Function, Infer, Train


@dataclasses.dataclass(frozen=True)
class ModelFunctionCall:
    """One function of one role, once per step: a node of the graph.

    Attributes:
        role: whose parameters it uses: policy, reference, reward or critic; None where
            no model takes part.
        function: what is asked.
        renames: batch key for each of the function's own names that differs from it.
    """

    role: str | None
    function: Function
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def key(self, name: str) -> str:
        """The batch key that stands for the function's own `name`."""
        return self.renames.get(name, name)

    @property
    def reads(self) -> tuple[str, ...]:
        """Batch keys this call needs."""
        return tuple(self.key(name) for name in self.function.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        """Batch keys this call adds."""
        return tuple(self.key(name) for name in self.function.writes)

    @property
    def is_training(self) -> bool:
        """Whether the call changes its role's parameters."""
        return isinstance(self.function, Train)

    @property
    def is_following(self) -> bool:
        """Whether the call moves its role's parameters towards another role's."""
        return isinstance(self.function, Follow)

    @property
    def changes_role(self) -> bool:
        """Whether the role's parameters are others after the call."""
        return self.is_training or self.is_following

    @property
    def needs_masters(self) -> bool:
        """Whether the call works with float32 masters, and not with a copy."""
        return self.changes_role or (
            isinstance(self.function, Infer) and self.function.is_as_trained
        )


def call(role: str | None, function: Function, **renames: str) -> ModelFunctionCall:
    """A node of the graph; keywords rename the function's keys.

    Example:
        >>> from realjax.functions import Infer
        >>> call("reference", Infer(), logprobs="ref_logprobs").writes
        ('ref_logprobs',)

    Raises:
        ValueError: if a keyword names no key of the function.
    """
    known = (*function.reads, *function.writes)
    for name in renames:
        if name not in known:
            raise ValueError(
                f"{name!r} is no key of this {type(function).__name__}, whose keys are "
                f"{', '.join(known)}."
            )
    return ModelFunctionCall(role, function, renames)


def following(
    role: str, *, source: str, weight: float, name: str = "follow"
) -> dict[str, ModelFunctionCall]:
    """The call that lets a role follow another one; none for a weight of 0.

    Args:
        role: that follows.
        source: that it follows, after its training.
        weight: of the source; see `Follow`.
        name: of the call.
    """
    if not weight:
        return {}
    return {name: call(role, Follow(source=source, weight=weight))}


class DataflowGraph:
    """Named calls in any order; a call follows those that write what it reads.

    Example:
        >>> from realjax.functions import Generate, Infer
        >>> DataflowGraph(
        ...     reward=call("reward", Infer(output="scores")),
        ...     rollout=call("policy", Generate()),
        ... ).levels()
        [['rollout'], ['reward']]

    Raises:
        ValueError: if two calls write the same key, if calls wait for each other, or if
            a role follows one that is not there or that follows itself.
    """

    def __init__(self, **calls: ModelFunctionCall):
        """Checks writers and acyclicity once, at construction."""
        self.calls = calls
        self._writer: dict[str, str] = {}
        for name, node in calls.items():
            for key in node.writes:
                if key in self._writer:
                    raise ValueError(
                        f"Both {self._writer[key]!r} and {name!r} write {key!r}. "
                        "Rename one of them where the call is made."
                    )
                self._writer[key] = name
        for name, node in calls.items():
            if isinstance(node.function, Follow):
                self._check_follows(name, node.role, node.function.source)
        self.levels()

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role that takes part, in order of appearance."""
        roles = (node.role for node in self.calls.values())
        return tuple(dict.fromkeys(role for role in roles if role is not None))

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Roles whose parameters a call changes."""
        return tuple(
            role for role in self.roles if any(c.is_training for c in self.of(role))
        )

    @property
    def changed_roles(self) -> tuple[str, ...]:
        """Roles whose parameters are others after a step: trained, or following."""
        return tuple(
            role for role in self.roles if any(c.changes_role for c in self.of(role))
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys that no call writes: the data set has to give them."""
        reads = (key for node in self.calls.values() for key in node.reads)
        return tuple(dict.fromkeys(key for key in reads if key not in self._writer))

    def of(self, role: str) -> list[ModelFunctionCall]:
        """The calls of one role."""
        return [node for node in self.calls.values() if node.role == role]

    def parents(self, name: str) -> set[str]:
        """Names of the calls that write what call `name` reads."""
        reads = self.calls[name].reads
        return {self._writer[key] for key in reads if key in self._writer}

    def children(self, name: str) -> list[str]:
        """Names of the calls that read what call `name` writes."""
        return [other for other in self.calls if name in self.parents(other)]

    def levels(self) -> list[list[str]]:
        """Call names by depth; calls of one level may run at the same time."""
        levels, done = [], set()
        while len(done) < len(self.calls):
            waiting = [name for name in self.calls if name not in done]
            ready = [name for name in waiting if self.parents(name) <= done]
            if not ready:
                raise ValueError(f"The calls {waiting} wait for one another.")
            levels.append(ready)
            done.update(ready)
        return levels

    def order(self) -> list[str]:
        """Call names in an order that respects the edges.

        Training calls come after all others, and what follows a trained role last.
        """
        names = [name for level in self.levels() for name in level]
        rank = lambda node: 2 if node.is_following else int(node.is_training)
        return sorted(names, key=lambda name: rank(self.calls[name]))

    def _check_follows(self, name: str, role: str | None, source: str) -> None:
        changing = [c for c in self.of(role) if c.changes_role] if role else []
        leaders = [c for c in self.of(source) if c.is_training]
        if len(changing) != 1 or not leaders or role == source:
            raise ValueError(
                f"Call {name!r} lets {role!r} follow {source!r}. It needs a role that "
                "no other call changes, and one that a call trains "
                f"({', '.join(self.trained_roles) or 'none here'})."
            )

    def require(self, available: tuple[str, ...]) -> None:
        """Checks that the data set gives what no call writes.

        Raises:
            ValueError: naming the key, who reads it and what there is.
        """
        for name, node in self.calls.items():
            for key in node.reads:
                if key not in self._writer and key not in available:
                    raise ValueError(
                        f"Call {name!r} reads {key!r}, which no call writes and the "
                        f"data set does not hold (it holds {', '.join(available)})."
                    )

"""The dataflow graph: model function calls joined by the keys they share."""

import dataclasses
from collections.abc import Mapping

from realjax.functions.function import (
    Delivery,
    Follow,
    Function,
    Generate,
    Infer,
    Train,
)


@dataclasses.dataclass(frozen=True)
class ModelFunctionCall:
    """One function of one role, once per step: a node of the graph.

    Attributes:
        role: whose parameters it uses: policy, reference, reward or critic; None where
            no model takes part.
        function: what is asked.
        renames: batch key for each of the function's own names that differs from it.
        staleness: 0 for a call that reads what its role is in its step. With 1 it runs
            a step ahead: step k makes with it what step k + 1 reads, from the data of
            step k + 1 and with the parameters as they are before step k changes them.
    """

    role: str | None
    function: Function
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    staleness: int = 0

    def __post_init__(self):
        """Refuses a staleness that a call like this cannot have."""
        if self.staleness not in (0, 1):
            raise ValueError(
                f"staleness is {self.staleness}. It is 0, strictly on-policy, or 1, a "
                "step ahead."
            )
        if not self.staleness:
            return
        kind = type(self.function).__name__
        if not isinstance(self.function, Generate):
            raise ValueError(
                f"staleness is 1 for a call that is a {kind}. Only one that generates "
                "can run a step ahead: leave it out."
            )
        if self.function.delivery != Delivery():
            raise ValueError(
                f"staleness is 1 for a call with {self.function.delivery}. With a "
                "budget completions are carried on for more steps than one, and what "
                "follows on portions belongs to the next step: set token_budget to 0 "
                "and portions to 1, or staleness to 0."
            )

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


def call(
    role: str | None, function: Function, *, staleness: int = 0, **renames: str
) -> ModelFunctionCall:
    """A node of the graph; keywords rename the function's keys.

    Args:
        role: whose parameters it uses, if any.
        function: what is asked.
        staleness: 1 lets a call that generates run a step ahead, beside the training
            of the step before; see `ModelFunctionCall`.
        renames: batch key for each of the function's own names that differs from it.

    Example:
        >>> from realjax.functions import Infer
        >>> call("reference", Infer(), logprobs="ref_logprobs").writes
        ('ref_logprobs',)

    Raises:
        ValueError: if a keyword names no key of the function, or a call like this has
            no staleness.
    """
    known = (*function.reads, *function.writes)
    for name in renames:
        if name not in known:
            raise ValueError(
                f"{name!r} is no key of this {type(function).__name__}, whose keys are "
                f"{', '.join(known)}."
            )
    return ModelFunctionCall(role, function, renames, staleness)


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
        ValueError: if two calls write the same key, if calls wait for each other, if a
            role follows one that is not there or that follows itself, or if a call that
            runs a step ahead reads what another call makes.
    """

    def __init__(self, **calls: ModelFunctionCall | None):
        """Checks writers and acyclicity once, at construction; None is no call."""
        self.calls = {name: node for name, node in calls.items() if node is not None}
        self._writer: dict[str, str] = {}
        for name, node in self.calls.items():
            for key in node.writes:
                if key in self._writer:
                    raise ValueError(
                        f"Both {self._writer[key]!r} and {name!r} write {key!r}. "
                        "Rename one of them where the call is made."
                    )
                self._writer[key] = name
        for name, node in self.calls.items():
            if isinstance(node.function, Follow):
                self._check_follows(name, node.role, node.function.source)
        self._check_stale()
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
    def stale_calls(self) -> tuple[str, ...]:
        """Calls that run a step ahead; none where training is strictly on-policy."""
        return tuple(name for name, node in self.calls.items() if node.staleness)

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

    def _check_stale(self) -> None:
        for name in self.stale_calls:
            for key in self.calls[name].reads:
                if key in self._writer:
                    raise ValueError(
                        f"Call {name!r} runs a step ahead (staleness is 1) and reads "
                        f"{key!r}, which call {self._writer[key]!r} makes in its own "
                        "step. Let it read the data set's keys alone, or set "
                        "staleness to 0."
                    )
        for name, node in self.calls.items():
            is_sampled = isinstance(node.function, Generate) and not node.staleness
            if is_sampled and self.stale_calls:
                raise ValueError(
                    f"Call {self.stale_calls[0]!r} generates a step ahead, and call "
                    f"{name!r} in its own step. Give all calls that generate the same "
                    "staleness."
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

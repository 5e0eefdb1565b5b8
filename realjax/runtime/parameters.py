"""Where every role's parameters are: homes, copies for calls elsewhere, the host.

This is the only holder of parameters in a run, so that dropping one here frees it. It
counts how often each role was changed, and gives a call the parameters that the
schedule says it must see, or none.

What of a role stands beside adapters, its base, never changes. It is copied to the
places of calls elsewhere once and stays there; from then on only adapters move. A role
that an allocation offloads keeps no base elsewhere.

    home       base  adapters  moments
    elsewhere  base  ◀──────             adapters before the call
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax

from realjax.core.arrays import PyTree
from realjax.dataflow.schedule import Part, Place
from realjax.functions.train import TrainState
from realjax.models import quantized, transformer
from realjax.models.config import ModelConfig
from realjax.models.parameters import join, split
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from realjax.realloc import offload
from realjax.realloc.mixing import mix
from realjax.realloc.quantizing import quantize
from realjax.realloc.transfer import Traffic, reallocate

PARTS: tuple[Part, ...] = ("parameters", "optimizer")


class VersionError(RuntimeError):
    """A call would see parameters older or newer than the graph says."""


@dataclasses.dataclass
class _Kept:
    """What a role keeps between calls.

    Attributes:
        device: parts on the devices of its home; what stands beside adapters under
            "base", apart from "parameters".
        host: copies of parts in host memory, made of what the role is now.
        version: how often the role was changed.
        step_version: what that was when the step began.
    """

    device: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    host: dict[str, offload.HostCopy] = dataclasses.field(default_factory=dict)
    version: int = 0
    step_version: int = 0


class ParameterStore:
    """Parameters of every role.

    Attributes:
        models: of each role.
        homes: where each role stays.
        resting: parts of roles, (role, part), that are in host memory between steps.
        basing: roles whose bases stay at the places of their calls.
        verifies: whether every move of parameters is checked by sums.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        homes: Mapping[str, Place],
        resting: Collection[tuple[str, Part]] = (),
        *,
        basing: Collection[str] = (),
        verifies: bool = False,
    ):
        """Starts empty.

        Args:
            models: of each role.
            homes: where each role stays; float32 masters where it is changed.
            resting: parts of roles that are in host memory between steps.
            basing: roles whose bases stay at the places of their calls.
            verifies: whether every move of parameters is checked by sums, and waits.
        """
        self.models, self.homes = models, homes
        self.resting, self.verifies = frozenset(resting), verifies
        self.basing = frozenset(basing)
        self._kept: dict[str, _Kept] = {role: _Kept() for role in homes}
        self._copies: dict[tuple, tuple[int, PyTree]] = {}
        self._bases: dict[tuple, PyTree] = {}

    def shardings(
        self, role: str, place: Place, *, is_quantized: bool = False
    ) -> PyTree:
        """How the role's parameters lie at a place.

        Args:
            role: whose.
            place: where.
            is_quantized: as they stay there; else as they come, in `place.dtype` alone.
        """
        abstract = transformer.abstract_parameters(self.models[role])
        if is_quantized:
            abstract = quantized.abstract(abstract, place.weights)
        allocation = place.allocation
        return parameter_shardings(
            abstract, make_mesh(allocation), options=allocation.options
        )

    def real_shapes(self, names: Collection[str]) -> dict[str, tuple[int | None, ...]]:
        """Sizes without padding, None where there is never any.

        Args:
            names: paths of arrays that begin with their role and end with the path of a
                parameter, as in "policy/optimizer/1/mu/layers/mlp/up/kernel".
        """
        found = {}
        for role, config in self.models.items():
            leaves = jax.tree_util.tree_leaves_with_path(
                transformer.abstract_parameters(config),
                is_leaf=lambda node: hasattr(node, "axes"),
            )
            for path, leaf in leaves:
                end = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
                real = tuple(
                    size if axis in ("vocab", "layer") else None
                    for axis, size in zip(leaf.axes, leaf.real_shape, strict=True)
                )
                for name in names:
                    if name.startswith(f"{role}/") and name.endswith(end):
                        found[name] = real
        return found

    # -- what roles keep -----------------------------------------------------------

    def set_initial(self, role: str, parameters: PyTree) -> None:
        """Parameters a role starts from, from anywhere; cast to its home's type.

        Those of a trained role become masters when its optimizer joins them.
        """
        home, kept = self.homes[role], self._kept[role]
        moved, base = self._split(role, parameters)
        moved = self._sent(role, home, moved, 0, alias=True)
        if self._has_base(role):
            kept.device["base"] = self._sent(role, home, base, 1, alias=True)
            kept.host.pop("base", None)
        self._change(role, {"parameters": moved})
        if (role, "parameters") in self.resting:
            self.offload(role)

    def set_train_state(self, role: str, state: TrainState) -> None:
        """Masters and optimizer state of a trained role, at its home."""
        trained, base = self._split(role, state.parameters)
        if self._has_base(role):
            self._kept[role].device["base"] = base
        self._change(role, {"parameters": trained, "optimizer": state.optimizer})

    def train_state(self, role: str) -> TrainState:
        """Masters and optimizer state of a trained role, at its home."""
        return TrainState(*(self.reload(role, part) for part in PARTS))

    def saved_state(self, role: str) -> dict[Part, PyTree]:
        """What a checkpoint holds of a role, wherever it is now: no base."""
        kept = self._kept[role]
        found = {part: copy.tree for part, copy in kept.host.items()} | kept.device
        return {part: found[part] for part in PARTS if part in found}

    def forget(self, roles: Collection[str]) -> None:
        """Drops everything that roles keep but bases; `restore` comes next."""
        for role in roles:
            for part in PARTS:
                self._kept[role].device.pop(part, None)
                self._kept[role].host.pop(part, None)

    def restore(self, role: str, parts: Mapping[Part, PyTree]) -> None:
        """Takes back what `saved_state` gave, to where it rests."""
        bring = lambda t: offload.to_device(t) if offload.is_on_host(t) else t
        self._change(role, {part: bring(tree) for part, tree in parts.items()})
        self.rest()

    def rest(self) -> None:
        """Brings every role to where it is between steps."""
        for role, part in self.resting:
            self.offload(role, part)

    def at_home(self, role: str) -> PyTree:
        """The role's parameters where they stay, brought there if need be."""
        return self.reload(role)

    def offload(self, role: str, part: Part = "parameters") -> PyTree:
        """Leaves a part in host memory; a copy of what it is now is made once."""
        kept = self._kept[role]
        for name in self._names(role, part):
            tree = kept.device.pop(name, None)
            if tree is not None and name not in kept.host:
                kept.host[name] = offload.HostCopy(tree)
        return kept.host[part].tree if part in kept.host else None

    def reload(self, role: str, part: Part = "parameters") -> PyTree:
        """Brings a part back to its home, whole; the copy on the host stays."""
        kept = self._kept[role]
        for name in self._names(role, part):
            if name not in kept.device:
                kept.device[name] = kept.host[name].reload()
        found = [kept.device[name] for name in self._names(role, part)]
        return functools.reduce(join, found)

    def follow(self, role: str, source: str, weight: float, traffic: Traffic) -> PyTree:
        """Moves a role's parameters towards another's, in float32, at its home.

        Args:
            role: that follows.
            source: that it follows; a head that only one of them has is left alone.
            weight: of the source.
            traffic: counts what moves; added to.
        """
        mixed = mix(self.reload(source), self.reload(role), eta=weight, traffic=traffic)
        self._change(role, {"parameters": mixed})
        return mixed

    # -- copies for calls ----------------------------------------------------------

    def begin_step(self) -> None:
        """Versions of the schedule count from here."""
        for kept in self._kept.values():
            kept.step_version = kept.version

    def version(self, role: str) -> int:
        """How often the role was changed since the store was made."""
        return self._kept[role].version

    def get(self, role: str, place: Place, version: int) -> PyTree:
        """The role's parameters at a place they have been moved to.

        Args:
            role: whose.
            place: where.
            version: how often the role was changed since the step began.

        Raises:
            VersionError: they are of another version.
        """
        kept = self._kept[role]
        if place.key == self.homes[role].key:
            found, parameters = kept.version, self.reload(role)
        else:
            found, parameters = self._copies[role, place.key]
        self._check_version(role, place, found - kept.step_version, version)
        return parameters

    def move(
        self, role: str, place: Place, traffic: Traffic, *, version: int | None = None
    ) -> PyTree:
        """Copies the role's parameters from its home to a place.

        Args:
            role: whose.
            place: where to.
            traffic: counts what moves; added to.
            version: how often the role was changed since the step began; None takes
                what there is.

        Raises:
            VersionError: the home holds another version.
        """
        kept = self._kept[role]
        if version is not None:
            self._check_version(
                role, self.homes[role], kept.version - kept.step_version, version
            )
        trained, base = self._split(role, self.at_home(role))
        options = {"traffic": traffic, "verify": self.verifies}
        copy = self._sent(role, place, trained, 0, **options)
        if self._has_base(role):
            found = self._base_at(role, place)
            if found is None:
                found = self._sent(role, place, base, 1, **options)
                if role in self.basing:
                    self._bases[role, *_base_key(place)] = found
            copy = join(copy, found)
        self._copies[role, place.key] = kept.version, copy
        return copy

    def release(self, role: str, place: Place) -> None:
        """Drops the role's copy at a place."""
        del self._copies[role, place.key]

    def keep_bases(self, places: Collection[tuple[str, Place]]) -> None:
        """Drops bases that stayed elsewhere than at these places.

        Args:
            places: roles, and where they are needed again.
        """
        wanted = {(role, *_base_key(place)) for role, place in places}
        for key in self._bases.keys() - wanted:
            del self._bases[key]

    def _has_base(self, role: str) -> bool:
        return self.models[role].adapters is not None

    def _base_at(self, role: str, place: Place) -> PyTree | None:
        """The role's base, where it is at a place already."""
        if role not in self.basing:
            return None
        if _base_key(place) == _base_key(self.homes[role]):
            return self._kept[role].device["base"]
        return self._bases.get((role, *_base_key(place)))

    def _sent(
        self, role: str, place: Place, tree: PyTree, side: int, **options: Any
    ) -> PyTree:
        """What is trained (side 0) or the base (side 1), at a place and in its type."""
        cut = self._split(role, self.shardings(role, place))[side]
        adapters, dtype = self.models[role].adapters, place.dtype
        if adapters is not None and side == 1:
            dtype = adapters.base_dtype or dtype
        sent = reallocate(tree, cut, dtype=dtype, **options)
        if not place.weights:
            return sent
        twin = self.shardings(role, place, is_quantized=True)
        cut = self._split(role, twin)[side]
        # Nothing else reads what a copy was made of.
        donate = not options.get("alias", False)
        return quantize(sent, cut, place.weights, donate=donate)

    def _split(self, role: str, tree: PyTree) -> tuple[PyTree, PyTree]:
        return split(tree, self.models[role])

    def _names(self, role: str, part: Part) -> tuple[str, ...]:
        """What goes with a part: a base with the adapters beside it."""
        is_beside = part == "parameters" and self._has_base(role)
        return (part, "base") if is_beside else (part,)

    def _change(self, role: str, parts: Mapping[Part, PyTree]) -> None:
        """Takes new parts; host copies of the old ones are of no use any more."""
        kept = self._kept[role]
        kept.version += 1
        for part, tree in parts.items():
            kept.host.pop(part, None)
            kept.device[part] = tree

    def _check_version(self, role: str, place: Place, found: int, needed: int) -> None:
        if found != needed:
            raise VersionError(
                f"The {role} at {place} was changed {found} times in this step, and the"
                f" call that reads it there needs it after {needed} changes. Move it"
                " anew: a step's schedule does so, parameters set in between do not."
            )


def _base_key(place: Place) -> tuple:
    return place.allocation.layout_key, place.weights

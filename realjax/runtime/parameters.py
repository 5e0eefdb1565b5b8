"""Where every role's parameters are: homes, copies for calls elsewhere, the host.

This is the only holder of parameters in a run, so that dropping one here frees it. It
counts how often each role was changed, and gives a call the parameters that the
schedule says it must see, or none.
"""

import dataclasses
from collections.abc import Collection, Mapping

import jax

from realjax.core.arrays import PyTree
from realjax.dataflow.schedule import Part, Place
from realjax.functions.train import TrainState
from realjax.models import quantized, transformer
from realjax.models.config import ModelConfig
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
        device: parts on the devices of its home.
        host: copies of parts in host memory, made of what the role is now.
        version: how often the role was changed.
        step_version: what that was when the step began.
    """

    device: dict[Part, PyTree] = dataclasses.field(default_factory=dict)
    host: dict[Part, offload.HostCopy] = dataclasses.field(default_factory=dict)
    version: int = 0
    step_version: int = 0


class ParameterStore:
    """Parameters of every role.

    Attributes:
        models: of each role.
        homes: where each role stays.
        resting: parts of roles, (role, part), that are in host memory between steps.
        verifies: whether every move of parameters is checked by sums.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        homes: Mapping[str, Place],
        resting: Collection[tuple[str, Part]] = (),
        *,
        verifies: bool = False,
    ):
        """Starts empty.

        Args:
            models: of each role.
            homes: where each role stays; float32 masters where it is changed.
            resting: parts of roles that are in host memory between steps.
            verifies: whether every move of parameters is checked by sums, and waits.
        """
        self.models, self.homes = models, homes
        self.resting, self.verifies = frozenset(resting), verifies
        self._kept: dict[str, _Kept] = {role: _Kept() for role in homes}
        self._copies: dict[tuple, tuple[int, PyTree]] = {}

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
        home = self.homes[role]
        moved = reallocate(
            parameters, self.shardings(role, home), dtype=home.dtype, alias=True
        )
        if home.weights:
            cut = self.shardings(role, home, is_quantized=True)
            moved = quantize(moved, cut, home.weights)
        self._change(role, {"parameters": moved})
        if (role, "parameters") in self.resting:
            self.offload(role)

    def set_train_state(self, role: str, state: TrainState) -> None:
        """Masters and optimizer state of a trained role, at its home."""
        parts: dict[Part, PyTree] = {
            "parameters": state.parameters,
            "optimizer": state.optimizer,
        }
        self._change(role, parts)

    def train_state(self, role: str) -> TrainState:
        """Masters and optimizer state of a trained role, at its home."""
        return TrainState(*(self.reload(role, part) for part in PARTS))

    def saved_state(self, role: str) -> dict[Part, PyTree]:
        """What a checkpoint holds of a role, wherever it is now."""
        kept = self._kept[role]
        found: dict[Part, PyTree] = {p: copy.tree for p, copy in kept.host.items()}
        return found | kept.device

    def forget(self, roles: Collection[str]) -> None:
        """Drops everything that roles keep; `restore` comes next."""
        for role in roles:
            self._kept[role].device.clear()
            self._kept[role].host.clear()

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
        tree = kept.device.pop(part, None)
        if tree is not None and part not in kept.host:
            kept.host[part] = offload.HostCopy(tree)
        return kept.host[part].tree if part in kept.host else None

    def reload(self, role: str, part: Part = "parameters") -> PyTree:
        """Brings a part back to its home; the copy on the host stays."""
        kept = self._kept[role]
        if part not in kept.device:
            kept.device[part] = kept.host[part].reload()
        return kept.device[part]

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
        copy = reallocate(
            self.at_home(role),
            self.shardings(role, place),
            dtype=place.dtype,
            traffic=traffic,
            verify=self.verifies,
        )
        if place.weights:
            cut = self.shardings(role, place, is_quantized=True)
            copy = quantize(copy, cut, place.weights, donate=True)
        self._copies[role, place.key] = kept.version, copy
        return copy

    def release(self, role: str, place: Place) -> None:
        """Drops the role's copy at a place."""
        del self._copies[role, place.key]

    def _change(self, role: str, parts: dict[Part, PyTree]) -> None:
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

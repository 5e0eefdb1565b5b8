"""Where every role's parameters are: homes, copies for calls elsewhere, the host.

This is the only holder of parameters in a run, so that dropping one here frees it.
"""

from collections.abc import Collection, Mapping

import jax

from realjax.core.arrays import PyTree
from realjax.dataflow.schedule import Place
from realjax.functions.train import TrainState
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from realjax.realloc import offload
from realjax.realloc.transfer import Traffic, reallocate


class ParameterStore:
    """Parameters of every role.

    Attributes:
        offloaded: roles that wait in host memory between their calls.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        homes: Mapping[str, Place],
        offloaded: Collection[str] = (),
    ):
        """Starts empty.

        Args:
            models: of each role.
            homes: where each role stays; float32 masters where it is trained.
            offloaded: roles that wait in host memory.
        """
        self.models, self.homes = models, homes
        self.offloaded = frozenset(offloaded)
        self._trained: dict[str, TrainState] = {}
        self._frozen: dict[str, PyTree] = {}
        self._host: dict[str, PyTree] = {}
        self._copies: dict[tuple, PyTree] = {}

    def shardings(self, role: str, place: Place) -> PyTree:
        """How the role's parameters lie at a place."""
        abstract = transformer.abstract_parameters(self.models[role])
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

    def set_train_state(self, role: str, state: TrainState) -> None:
        """Masters and optimizer state of a trained role, at its home."""
        self._trained[role] = state
        self._frozen.pop(role, None)

    def train_state(self, role: str) -> TrainState:
        """Masters and optimizer state of a trained role."""
        return self._trained[role]

    def set_initial(self, role: str, parameters: PyTree) -> None:
        """Parameters a role starts from, from anywhere; cast to its home's type.

        Those of a trained role become masters when its optimizer joins them.
        """
        home = self.homes[role]
        self._frozen[role] = reallocate(
            parameters, self.shardings(role, home), dtype=home.dtype, alias=True
        )
        self._host.pop(role, None)
        if role in self.offloaded:
            self.offload(role)

    def at_home(self, role: str) -> PyTree:
        """The role's parameters where they stay."""
        if role in self._trained:
            return self._trained[role].parameters
        if role not in self._frozen:
            self.reload(role)
        return self._frozen[role]

    def get(self, role: str, place: Place) -> PyTree:
        """The role's parameters at a place they have been moved to."""
        if place.key == self.homes[role].key:
            return self.at_home(role)
        return self._copies[role, place.key]

    def move(self, role: str, place: Place, traffic: Traffic) -> PyTree:
        """Copies the role's parameters from its home to a place."""
        copy = reallocate(
            self.at_home(role),
            self.shardings(role, place),
            dtype=place.dtype,
            traffic=traffic,
        )
        self._copies[role, place.key] = copy
        return copy

    def release(self, role: str, place: Place) -> None:
        """Drops the role's copy at a place."""
        del self._copies[role, place.key]

    def offload(self, role: str) -> None:
        """Leaves the role in host memory; the host copy is made once."""
        parameters = self._frozen.pop(role)
        if role not in self._host:
            self._host[role] = jax.block_until_ready(offload.to_host(parameters))

    def reload(self, role: str) -> None:
        """Brings the role back to its home."""
        self._frozen[role] = offload.to_device(self._host[role])

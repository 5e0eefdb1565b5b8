"""What may make a plan fit where none does: changes of a config, larger machines."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from realjax.functions.role import Role
from realjax.planner.cluster import Cluster
from realjax.runtime.run_config import RunConfig

MEMORY_SHARES = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
DEVICES = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change.

    Attributes:
        text: of the change, for people.
        config, roles, cluster: with it.
        memory_share: of the memory that a device has, how many times as much.
    """

    text: str
    config: RunConfig
    roles: Mapping[str, Role]
    cluster: Cluster
    memory_share: float = 1.0


def remedies(
    config: RunConfig, roles: Mapping[str, Role], cluster: Cluster
) -> Iterator[Remedy]:
    """Go over changes, the smallest first: what costs time, then what costs machines.

    Args:
        config: that no plan fits.
        roles: of its run.
        cluster: the machine.
    """

    def remedy(text: str, **changes: Any) -> Remedy:
        given: dict[str, Any] = {"config": config, "roles": roles, "cluster": cluster}
        return Remedy(text=text, **given | changes)

    for field in ("rows", "allocations"):
        if any(getattr(config, field).values()):
            changed = dataclasses.replace(config, **{field: {}})
            yield remedy(f"config.{field} left to the planner", config=changed)
    for name, role in roles.items():
        if role.is_trained and role.config.remat not in ("", "block"):
            changed = _with(roles, name, remat="")
            yield remedy(
                f"config.roles.{name}.remat left to the planner", roles=changed
            )
    trained = [
        name
        for name, role in roles.items()
        if role.is_trained and not role.config.optimizer.offload
    ]
    by_size = sorted(trained, key=lambda name: roles[name].model.num_parameters)
    groups: list[tuple[str, ...]] = [(name,) for name in by_size]
    if len(trained) > 1:
        groups.append(tuple(trained))
    for names in groups:
        texts = [f"config.roles.{name}.optimizer.offload=True" for name in names]
        changed = dict(roles)
        for name in names:
            optimizer = dataclasses.replace(roles[name].config.optimizer, offload=True)
            changed = _with(changed, name, optimizer=optimizer)
        yield remedy(" and ".join(texts), roles=changed)
    if config.memory_gib:
        for share in MEMORY_SHARES:
            gib = config.memory_gib * share
            yield remedy(f"config.memory_gib={gib:.3g}", memory_share=share)
    for count in DEVICES:
        larger = dataclasses.replace(cluster, num_nodes=cluster.num_nodes * count)
        yield remedy(f"{larger.num_devices} such devices", cluster=larger)


def _with(roles: Mapping[str, Role], name: str, **changes: Any) -> dict[str, Role]:
    config = dataclasses.replace(roles[name].config, **changes)
    return {**roles, name: dataclasses.replace(roles[name], config=config)}

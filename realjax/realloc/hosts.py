"""Hosts: which devices share one, so that routes cross between hosts once."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The host of every device: `uniform`, `of` devices, or an explicit table.

    Equal hosts are equal keys, and hosts are the same in every process.

    Attributes:
        devices_per_host: Devices 0 to n - 1 are on host 0, the next n on host 1, …
        table: Instead of it, (device id, host) of every device, by rising id: the ids
            of the devices of several processes need not follow each other.

    Raises:
        ValueError: neither or both of the two, fewer than one device on a host, or a
            table whose ids do not rise.
    """

    devices_per_host: int | None = None
    table: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that there is one way to tell a host."""
        if (self.devices_per_host is None) == (not self.table):
            raise ValueError(
                f"Found devices_per_host={self.devices_per_host} and a table of"
                f" {len(self.table)} devices. Give one of the two."
            )
        if self.devices_per_host is not None and self.devices_per_host < 1:
            raise ValueError(
                f"devices_per_host={self.devices_per_host}; a host has at least one."
            )
        ids = [device for device, _ in self.table]
        if ids != sorted(set(ids)):
            raise ValueError(
                f"The table names devices {ids}. Name each device once, by rising id."
            )

    @classmethod
    def uniform(cls, devices_per_host: int) -> "Hosts":
        """Put so many devices on every host, in the order of their ids."""
        return cls(devices_per_host=devices_per_host)

    @classmethod
    def of(cls, devices: Iterable) -> "Hosts":
        """Take the process of every device for its host.

        Args:
            devices: JAX devices, with `id` and `process_index`; `jax.devices()` lists
                the same ones in every process.
        """
        return cls(table=tuple(sorted((d.id, d.process_index) for d in devices)))

    def of_devices(self, devices: np.ndarray) -> np.ndarray:
        """Return the host of every device.

        Args:
            devices: Integers of any shape: ids.

        Raises:
            ValueError: a device that the table lacks.
        """
        if self.devices_per_host is not None:
            return devices // self.devices_per_host
        ids, hosts = self._columns
        places = np.minimum(np.searchsorted(ids, devices), len(ids) - 1)
        missing = np.unique(devices[ids[places] != devices])
        if len(missing):
            raise ValueError(
                f"No host is known for devices {missing.tolist()}; the table has"
                f" devices {ids.tolist()}. Make it of all devices: Hosts.of("
                "jax.devices())."
            )
        return hosts[places]

    def of_device(self, device: int) -> int:
        """Return the host of one device."""
        return int(self.of_devices(np.array([device]))[0])

    @functools.cached_property
    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        ids, hosts = zip(*self.table, strict=True)
        return np.array(ids, np.int64), np.array(hosts, np.int64)

"""The machine that a plan is for: devices, nodes, and what is between them.

    Cluster.load("8xh100")          a preset; "4x8xh100" are four nodes of eight
    Cluster.load("cluster.json")    the fields of `Cluster` and `Device`
    Cluster.detect()                the devices of this process

Rates are those of data sheets, for one direction of one device. What programs reach of
them is a matter of `Coefficients`.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax

from realjax.core.config import suggest

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        kind: its name.
        memory_bytes: that programs may use.
        flops_per_second: of matrix products in bfloat16, without sparsity.
        bytes_per_second: of its memory.
        host_bytes_per_second: of its link to host memory.
    """

    kind: str
    memory_bytes: int
    flops_per_second: float
    bytes_per_second: float
    host_bytes_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices.

    Attributes:
        device: of which all are.
        num_nodes: nodes; devices 0 to n - 1 are the first one's, and so on.
        devices_per_node: n.
        link_bytes_per_second: between two devices of a node.
        network_bytes_per_second: between devices of two nodes, for each device.
        host_memory_bytes: of a node.
        concurrent_devices: of a node, whose work truly runs at the same time; 0 is all.
            Eight virtual devices on two cores take turns.
        is_serial: whether programs on different devices wait for each other, as those
            of a CPU do once one of them has several devices.
    """

    device: Device
    num_nodes: int = 1
    devices_per_node: int = 1
    link_bytes_per_second: float
    network_bytes_per_second: float
    host_memory_bytes: int
    concurrent_devices: int = 0
    is_serial: bool = False

    def __post_init__(self):
        least = {"num_nodes": 1, "devices_per_node": 1, "concurrent_devices": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(
                    f"A cluster's {name} is {getattr(self, name)}; it must be at least"
                    f" {bound}."
                )

    def turns(self, num_devices: int) -> float:
        """How many times longer each of some devices takes than on a core of its own.

        Below 1 where there are more cores than devices: a program takes them all.

        Args:
            num_devices: that work at the same time, on nodes filled one by one.
        """
        of_node = min(num_devices, self.devices_per_node)
        return of_node / (self.concurrent_devices or of_node)

    @property
    def num_devices(self) -> int:
        """The devices of all nodes."""
        return self.num_nodes * self.devices_per_node

    @property
    def name(self) -> str:
        """As in "4x8xh100"."""
        kind = re.sub(r"[^a-z0-9]+", "", self.device.kind.lower().replace("nvidia", ""))
        return f"{self.num_nodes}x{self.devices_per_node}x{kind}"

    @classmethod
    def load(cls, text: str) -> "Cluster":
        """Read a preset's name or a file.

        Args:
            text: "h200", "8xh100", "4x8xh100", "8xcpu", or the path of a JSON file.

        Raises:
            ValueError: neither of the two, or a file with other fields.
        """
        if text.endswith(".json"):
            return cls.from_dict(json.loads(pathlib.Path(text).read_text()))
        match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([a-z]+\d*)", text.lower())
        kind = match[3] if match else ""
        if match is None or kind not in _KINDS:
            raise ValueError(
                f"{text!r} is no cluster. Write a kind of device"
                f" ({', '.join(_KINDS)}), how many, and of how many nodes, as in"
                f" 4x8xh100, or name a .json file. {suggest(kind, _KINDS)}"
            )
        return dataclasses.replace(
            _KINDS[kind],
            num_nodes=int(match[1] or 1),
            devices_per_node=int(match[2] or 1),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cluster":
        """Read the fields of a cluster; `device` may be the name of a known kind.

        Raises:
            ValueError: a field that is none.
        """
        values = dict(values)
        device = values.pop("device", None)
        base: dict[str, Any] = {}
        if isinstance(device, str):
            if device not in _KINDS:
                raise ValueError(
                    f"The device {device!r} is not known. {suggest(device, _KINDS)}"
                    " Or give its fields."
                )
            known = _KINDS[device]
            base = {f.name: getattr(known, f.name) for f in dataclasses.fields(known)}
        elif device is not None:
            base["device"] = Device(**device)
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f"A cluster has no {name!r}. {suggest(name, fields)}")
        return cls(**(base | values))

    @classmethod
    def detect(cls) -> "Cluster":
        """Describe the devices of all processes of this run.

        Virtual devices of a CPU share the cores that this process may use.
        """
        devices = jax.devices()
        kind = next((k for k in _KINDS if k in devices[0].device_kind.lower()), "cpu")
        num_nodes = len({device.process_index for device in devices})
        found = cls.load(f"{num_nodes}x{len(devices) // num_nodes}x{kind}")
        if devices[0].platform == "cpu":
            cores = len(os.sched_getaffinity(0))
            found = dataclasses.replace(
                found, concurrent_devices=cores, is_serial=len(devices) > 1
            )
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        if not limit:
            return found
        device = dataclasses.replace(found.device, memory_bytes=int(limit))
        return dataclasses.replace(found, device=device)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)


# Data sheets. A link of a node is NVLink's one direction; the network is the share of
# one device of its node's.
_KINDS = {
    "h100": Cluster(
        device=Device(
            kind="NVIDIA H100",
            memory_bytes=80 * GB,
            flops_per_second=989e12,
            bytes_per_second=3.35e12,
            host_bytes_per_second=64e9,
        ),
        link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        host_memory_bytes=2048 * GIB,
    ),
    "h200": Cluster(
        device=Device(
            kind="NVIDIA H200",
            memory_bytes=141 * GB,
            flops_per_second=989e12,
            bytes_per_second=4.8e12,
            host_bytes_per_second=64e9,
        ),
        link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        host_memory_bytes=2048 * GIB,
    ),
    "a100": Cluster(
        device=Device(
            kind="NVIDIA A100",
            memory_bytes=80 * GB,
            flops_per_second=312e12,
            bytes_per_second=2.04e12,
            host_bytes_per_second=32e9,
        ),
        link_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
        host_memory_bytes=1024 * GIB,
    ),
    # Orders of magnitude of one core; a profile says what there is.
    "cpu": Cluster(
        device=Device(
            kind="cpu",
            memory_bytes=4 * GIB,
            flops_per_second=50e9,
            bytes_per_second=10e9,
            host_bytes_per_second=10e9,
        ),
        link_bytes_per_second=5e9,
        network_bytes_per_second=1e9,
        host_memory_bytes=16 * GIB,
    ),
}

"""Reallocation: parameters and batches between allocations, never through the host.

Read `routes` first (what moves where, without devices; its nouns are `layouts`, `hosts`
and `hops`), then `transfer` (which moves it) and `mixing` (averages on the way). Behind
them are `plans` (what is kept about a tree), `assembly`, `pieces` and `programs` (the
route that slices and joins), `crossing` (other processes) and `offload` (host memory).
`docs/reallocation.md` is the page for those who use it.
"""

from realjax.realloc.hosts import Hosts
from realjax.realloc.mixing import mix
from realjax.realloc.offload import is_on_host, live_bytes, to_device, to_host
from realjax.realloc.routes import Layout, Route, route
from realjax.realloc.transfer import Traffic, move_array, move_batch, reallocate

__all__ = [
    "Hosts",
    "Layout",
    "Route",
    "Traffic",
    "is_on_host",
    "live_bytes",
    "mix",
    "move_array",
    "move_batch",
    "reallocate",
    "route",
    "to_device",
    "to_host",
]

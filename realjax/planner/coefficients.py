"""Coefficients of a kind of device: fitted to what was measured, and kept in a file.

    find_profile(cluster)                     what `realjax.cli.profile` stored, or None
    coefficients_of(cluster).coefficients    these, or the defaults
    coefficients_of(cluster).source          and which of the two

Files are in the user's cache folder, or where the variable REALJAX_PROFILES says, one
for each kind of device and each version of JAX and of this package: another version
compiles to other programs.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from realjax.core.config import suggest
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients, Quantities

# What no device does better than. Those without a data sheet of their own may.
DATA_SHEET = Coefficients(
    products=1.0,
    memory=1.0,
    link=1.0,
    network=1.0,
    host=1.0,
    layer_seconds=0.0,
    hop_seconds=0.0,
    program_seconds=0.0,
)

ROUNDS = 30
"""Of a fit, each from what the one before predicts."""


def fit(
    measured: Sequence[tuple[Quantities, float]],
    *,
    prior: Coefficients | None = None,
    trust: float = 0.05,
    least: Coefficients | None = None,
) -> Coefficients:
    """Find the coefficients that explain measured seconds.

    Least squares of log(predicted / measured), so that half and twice are as wrong as
    each other: with errors relative to what was measured the fit would be too short.
    What the measurements say nothing of keeps to the prior: a coefficient that is off
    by its own size costs as much as an error of `trust` in one measurement.

    Args:
        measured: what was done, and its seconds.
        prior: None is the default of `Coefficients`.
        trust: of the prior.
        least: of each coefficient; None is 0, and `DATA_SHEET` that of real devices.

    Raises:
        ValueError: nothing was measured.
    """
    from scipy.optimize import lsq_linear  # JAX depends on SciPy.

    if not measured:
        raise ValueError(
            "There are no measurements to fit coefficients to. Give at least one."
        )
    start = np.asarray(dataclasses.astuple(prior or Coefficients()))
    bounds = np.zeros(len(start)) if least is None else dataclasses.astuple(least)
    rows = np.asarray([q for q, _ in measured], np.float64)
    seconds = np.asarray([s for _, s in measured], np.float64)
    pull = trust * np.eye(len(start))
    lower, predicted = np.asarray(bounds) / start, seconds
    for _ in range(ROUNDS):
        # A logarithm is a straight line near what was predicted before (Gauss-Newton).
        off = np.clip(np.log(predicted / seconds), -1.0, 1.0)
        # In units of the prior: every coefficient is about 1.
        system = np.concatenate([rows * start / predicted[:, None], pull])
        wanted = np.concatenate([1.0 - off, trust * np.ones(len(start))])
        found = lsq_linear(system, wanted, (lower, np.inf), method="bvls").x
        found = np.maximum(found, lower)  # It rounds to a hair below.
        predicted = np.maximum(rows @ (start * found), 1e-3 * seconds)
    names = [field.name for field in dataclasses.fields(Coefficients)]
    return Coefficients(**dict(zip(names, map(float, found * start), strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A call that was measured, and what the coefficients say of it.

    Attributes:
        name: of the call: what, of which model, on which allocation.
        seconds: measured.
        predicted_seconds: by coefficients that were not fitted to it.
    """

    name: str
    seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Relative, above 0 where the prediction is too long."""
        return self.predicted_seconds / self.seconds - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What was found out about a kind of device.

    Attributes:
        coefficients: of its devices.
        cluster: on which they were measured.
        jax, realjax: versions.
        num_fitted: calls and copies that the fit is to.
        checked: calls drawn after the fit.
    """

    coefficients: Coefficients
    cluster: Cluster
    jax: str
    realjax: str
    num_fitted: int = 0
    checked: tuple[Checked, ...] = ()

    @property
    def mean_error(self) -> float:
        """Mean absolute error of the calls drawn after the fit; NaN without any."""
        if not self.checked:
            return float("nan")
        return float(np.mean([abs(one.error) for one in self.checked]))

    @property
    def worst(self) -> Checked | None:
        """The call whose prediction is furthest off."""
        return max(self.checked, key=lambda one: abs(one.error), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Profile":
        """Read what `as_dict` gave.

        Raises:
            ValueError: a field that is none, or one that is missing.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f"A profile has no {name!r}. {suggest(name, fields)}")
        try:
            return cls(
                **values
                | {
                    "coefficients": Coefficients(**values["coefficients"]),
                    "cluster": Cluster.from_dict(values["cluster"]),
                    "checked": tuple(Checked(**v) for v in values.get("checked", ())),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"This is no profile: {error}. Measure one anew with"
                " `python -m realjax.cli.profile`."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Coefficients, and where they are from.

    Attributes:
        coefficients: of a machine's devices.
        is_measured: whether on such devices; else they are the defaults.
        source: in words.
    """

    coefficients: Coefficients
    is_measured: bool
    source: str


def profiles_folder() -> pathlib.Path:
    """Return where profiles are kept: by default in the user's cache folder."""
    if given := os.environ.get("REALJAX_PROFILES"):
        return pathlib.Path(given)
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "realjax" / "profiles"


def versions() -> dict[str, str]:
    """Return those of JAX and of this package."""
    return {"jax": jax.__version__, "realjax": importlib.metadata.version("realjax")}


def store_profile(profile: Profile, path: pathlib.Path | None = None) -> pathlib.Path:
    """Write a profile.

    Args:
        profile: what was measured.
        path: of the file; None is where `find_profile` looks.

    Returns:
        The path.
    """
    if path is None:
        own = {"jax": profile.jax, "realjax": profile.realjax}
        path = profiles_folder() / _file_name(profile.cluster, own)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(profile.as_dict(), indent=1) + "\n")
    return path


def read_profile(path: str | pathlib.Path) -> Profile:
    """Read a file that `store_profile` wrote.

    Raises:
        ValueError: it holds something else.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    try:
        return Profile.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_profile(cluster: Cluster) -> Profile | None:
    """Return what was stored of a cluster's kind of device, by these versions.

    Args:
        cluster: of such devices; how many does not matter, except on a CPU, whose
            devices share its cores.
    """
    path = profiles_folder() / _file_name(cluster, versions())
    return read_profile(path) if path.exists() else None


def coefficients_of(cluster: Cluster) -> Known:
    """Return the coefficients of a machine: measured if possible, else the defaults.

    Args:
        cluster: the machine.
    """
    profile = find_profile(cluster)
    if profile is None:
        return Known(
            coefficients=Coefficients(),
            is_measured=False,
            source=f"defaults: no profile of {cluster.device.kind} is stored. Measure"
            " one with `python -m realjax.cli.profile`.",
        )
    return Known(
        coefficients=profile.coefficients,
        is_measured=True,
        source=f"measured on {profile.cluster.name}, calls drawn after the fit with a"
        f" mean error of {100 * profile.mean_error:.0f} %",
    )


def _file_name(cluster: Cluster, own: dict[str, str]) -> str:
    kind = re.sub(r"[^a-z0-9]+", "_", cluster.device.kind.lower()).strip("_")
    if cluster.concurrent_devices:
        kind += f"_{cluster.devices_per_node}_on_{cluster.concurrent_devices}"
    return f"{kind}-jax{own['jax']}-realjax{own['realjax']}.json"

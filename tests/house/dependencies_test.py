"""What the code imports is what pyproject.toml asks for and what the locks hold."""

import ast
import functools
import pathlib
import re
import sys
import tomllib
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PRODUCT = sorted(
    path
    for folder in ("realjax", "pallas_kernels", "configs")
    for path in (ROOT / folder).rglob("*.py")
)
OURS = {"realjax", "pallas_kernels", "configs"}
# Used where installed, imported inside the function that uses them.
OPTIONAL = {"wandb", "tokamax"}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    """Names of the distributions that realjax needs to run."""
    names = (re.match(r"[\w.-]+", line) for line in PROJECT["dependencies"])
    return {normalized(name.group()) for name in names if name}


@functools.cache
def providers() -> dict[str, set[str]]:
    """Distributions that give each importable package."""
    found = metadata.packages_distributions()
    return {package: {normalized(name) for name in found[package]} for package in found}


def imported_packages(path: pathlib.Path) -> dict[str, int]:
    """Top-level packages that a file imports, with the line."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0]: node.lineno for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found[node.module.split(".")[0]] = node.lineno
    return found


def locked(path: pathlib.Path) -> dict[str, str]:
    """Version of each distribution in a lock."""
    pins = re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;\\]+)", path.read_text(), re.M)
    return {normalized(name): version for name, version in pins}


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_imports_are_declared(path):
    for package, line in imported_packages(path).items():
        if package in sys.stdlib_module_names or package in OURS | OPTIONAL:
            continue
        names = providers().get(package, {normalized(package)})
        assert names & required(), (
            f"{relative(path)}:{line} imports {package}, which pyproject.toml does not"
            " list. Add it with its reason, or do without."
        )


def test_jax_is_pinned_exactly_and_once():
    cuda = PROJECT["optional-dependencies"]["cuda"]
    (jax,) = [line for line in PROJECT["dependencies"] if line.startswith("jax==")]
    assert cuda == [jax.replace("jax==", "jax[cuda13]==")]
    for lock in LOCKS:
        if "jax" in locked(lock):
            assert f"jax=={locked(lock)['jax']}" == jax


def test_locks_hold_what_the_project_asks_for():
    assert required() <= set(locked(ROOT / "requirements/run.lock"))


def test_locks_agree():
    versions: dict[str, str] = {}
    for lock in LOCKS:
        for name, version in locked(lock).items():
            assert versions.setdefault(name, version) == version, (
                f"{relative(lock)} holds {name} {version}, another lock"
                f" {versions[name]}. Run `make lock`."
            )


@pytest.mark.parametrize("path", LOCKS, ids=relative)
def test_locks_hold_hashes_and_no_addresses(path):
    text = path.read_text()
    assert not re.search(r"://|index|find-links|trusted-host", text)
    # Each requirement is followed by at least one hash, on continued lines.
    for entry in re.split(r"\n(?=\w)", text.strip()):
        assert "--hash=sha256:" in entry, f"{relative(path)}: no hash for {entry!r}"

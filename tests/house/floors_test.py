"""Imports go down: a file may import its own floor and the floors below, never above.

The floors are those of CONTRIBUTING.md. A file of realjax/ itself stands on top of all.
"""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOP = 11
FLOORS = {
    "core": 0,
    "data": 1,
    "rl": 1,
    "models": 2,
    "parallel": 3,
    "functions": 4,
    "rollout": 4,
    "realloc": 5,
    "dataflow": 6,
    "planner": 7,
    "runtime": 8,
    "algorithms": 9,
    "cli": 10,
    "bench": 10,
}
# What a floor must not know although it stands above: see "What a floor must not know".
STRANGERS = {
    "rl": {"data"},
    "data": {"rl"},
    "algorithms": {"parallel", "realloc", "runtime", "planner"},
}

PRODUCT = sorted((ROOT / "realjax").rglob("*.py"))
KERNELS = sorted((ROOT / "pallas_kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*_test.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor_of(path: pathlib.Path) -> str:
    """The folder of realjax/ that holds the file; "" for files of realjax/ itself."""
    parts = path.relative_to(ROOT / "realjax").parts
    return parts[0] if len(parts) > 1 else ""


@functools.cache
def nodes(path: pathlib.Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: pathlib.Path) -> list[str]:
    """Absolute dotted names of everything the file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def imported_floors(path: pathlib.Path) -> list[str]:
    """Folders of realjax/ that the file imports from; "" for realjax/ itself."""
    floors = []
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "realjax":
            folder = rest.partition(".")[0]
            is_floor = folder in FLOORS or (ROOT / "realjax" / folder).is_dir()
            floors.append(folder if is_floor else "")
    return floors


def height(floor: str) -> int:
    assert floor == "" or floor in FLOORS, (
        f"realjax/{floor} stands on no floor. Give it one in tests/house/floors_test.py"
        " and in CONTRIBUTING.md."
    )
    return FLOORS.get(floor, TOP)


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_imports_go_down(path):
    here = floor_of(path)
    for there in imported_floors(path):
        assert height(there) <= height(here), (
            f"{relative(path)} stands on floor {height(here)} and imports from"
            f" realjax/{there}, floor {height(there)}. Move the shared part down, or"
            " pass it in."
        )


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_strangers_do_not_meet(path):
    here = floor_of(path)
    met = STRANGERS.get(here, set()) & set(imported_floors(path))
    assert not met, f"{relative(path)} must know nothing of {', '.join(sorted(met))}."


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_know_nothing_of_realjax(path):
    names = [name for name in imports(path) if name.split(".")[0] == "realjax"]
    assert not names, f"{relative(path)} imports {names}; kernels stand alone."


def _constants_and_names(path: pathlib.Path) -> set[str]:
    """Identifiers and whole string constants of a file, docstrings left out."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.lower())
        elif isinstance(node, ast.Name):
            found.add(node.id.lower())
        elif isinstance(node, ast.Attribute):
            found.add(node.attr.lower())
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in PRODUCT if floor_of(path) in ("runtime", "planner")],
    ids=relative,
)
def test_runtime_and_planner_name_no_algorithm(path):
    algorithms = {file.stem for file in (ROOT / "realjax/algorithms").glob("*.py")}
    named = _constants_and_names(path) & (algorithms - {"__init__"})
    assert not named, (
        f"{relative(path)} names {sorted(named)}. What differs between algorithms is in"
        " their graphs; ask the graph."
    )


@pytest.mark.parametrize(
    "path",
    [path for path in PRODUCT if floor_of(path) not in ("realloc", "bench")],
    ids=relative,
)
def test_arrays_move_between_devices_only_in_realloc(path):
    found = _constants_and_names(path) & {"device_put", "device_put_sharded"}
    found |= {name for name in imports(path) if name.endswith(".device_put")}
    assert not found, (
        f"{relative(path)} calls {sorted(found)}, which goes through host memory"
        " between unlike layouts and aliases its source between like ones. Use"
        " realjax.realloc."
    )


@pytest.mark.parametrize("path", PRODUCT + KERNELS + CONFIGS + TESTS, ids=relative)
def test_torch_is_not_imported(path):
    names = [name for name in imports(path) if name.split(".")[0] == "torch"]
    assert not names, f"{relative(path)} imports {names}; realjax works without torch."

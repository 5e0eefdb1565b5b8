"""One word per thing (CONTRIBUTING.md), nothing unfinished, no place of one machine."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Words of an identifier that have a better one here.
SYNONYMS = {
    "actor": "policy",
    "rew": "reward",
    "rewarder": "reward",
    "rw": "reward",
    "rpc": "call",
    "rpcs": "calls",
    "mfc": "call",
    "mfcs": "calls",
    "topology": "allocation",
    "topo": "allocation",
    "reshard": "reallocate",
    "resharding": "reallocation",
    "experience": "rollout",
    "experiences": "rollouts",
    "response": "completion",
    "responses": "completions",
    "mbs": "microbatches",
    "dp": "data",
    "mp": "tensor",
    "tp": "tensor",
    "pp": "stage",
    "ep": "expert",
}
# `x_ref` is Pallas for a reference to memory, so only realjax/ is asked.
ROLE_SYNONYMS = {"ref": "reference"}
# The one short form of the vocabulary, and a name that others gave ("plus plus").
ALLOWED = {"ref_logprobs", "ref_logprob", "reinforce_pp"}

PYTHON_FOLDERS = ("realjax", "pallas_kernels", "configs")
PYTHON = sorted(
    path for folder in PYTHON_FOLDERS for path in (ROOT / folder).rglob("*.py")
)
# Absolute folders of somebody's machine; a URL or a relative path is neither.
PLACES = re.compile(r"(?<![\w.~}-])/(?:tmp|root|work|home|Users)/")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|NotImplementedError)\b")
SUFFIXES = {".py", ".md", ".toml", ".ipynb", ".yml", ".yaml", ".sh", ".lock", ".in", ""}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def repository_files() -> list[pathlib.Path]:
    """Text files that are, or would be, part of the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:  # An unpacked archive: take what the house is made of.
        folders = (*PYTHON_FOLDERS, "tests", "notebooks")
        found = [path for name in folders for path in (ROOT / name).rglob("*")]
        found += ROOT.glob("*")
    else:
        found = [ROOT / name for name in listing.stdout.split("\0") if name]
    return sorted(p for p in found if p.is_file() and p.suffix in SUFFIXES)


def words(identifier: str) -> list[str]:
    """The words of snake_case, CamelCase or both, in lower case."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)
    return [part.lower() for part in parts]


def defined_names(source: str) -> set[str]:
    """Names that a file gives to things; what it calls by others' names is not ours."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.arg():
                names.add(node.arg)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                names.add(node.attr)
    return names


def better_words(identifier: str, synonyms: dict[str, str]) -> list[str]:
    if identifier.strip("_") in ALLOWED:
        return []
    return [f"{w} -> {synonyms[w]}" for w in words(identifier) if w in synonyms]


def test_words_of_an_identifier():
    assert words("ActorCritic") == ["actor", "critic"]
    assert words("_num_HTTPRequests_2") == ["num", "http", "requests", "2"]
    assert better_words("actor_loss", SYNONYMS) == ["actor -> policy"]
    assert better_words("factor", SYNONYMS) == []
    assert better_words("ref_logprobs", ROLE_SYNONYMS) == []
    assert defined_names("def f(a, *, b=1):\n  c.d = e\n") == {"f", "a", "b", "d"}


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_things_have_the_names_of_the_vocabulary(path):
    synonyms = dict(SYNONYMS)
    if path.is_relative_to(ROOT / "realjax"):
        synonyms |= ROLE_SYNONYMS
    names = {path.stem, path.parent.name} | defined_names(path.read_text())
    found = {n: better for n in sorted(names) if (better := better_words(n, synonyms))}
    assert not found, f"{relative(path)}: {found}"


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_counts_are_called_num(path):
    names = [n for n in defined_names(path.read_text()) if re.match(r"_?n_[a-z]", n)]
    assert not names, f"{relative(path)} counts with {sorted(names)}; write num_…"


def test_no_file_names_a_place_of_one_machine():
    found = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in repository_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if PLACES.search(line)
    ]
    assert not found, "\n".join(["Folders of one machine:", *found])


def test_nothing_is_left_unfinished():
    found = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in PYTHON
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert not found, "\n".join(["Unfinished:", *found])

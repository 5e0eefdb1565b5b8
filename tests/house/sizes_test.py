"""Files stay short enough to be read in one sitting."""

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("realjax", "pallas_kernels", "configs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
ALGORITHMS = sorted((ROOT / "realjax/algorithms").glob("*.py"))

MAX_FILE_LINES = 500
MAX_ALGORITHM_LINES = 100
# Lines of code of an algorithm that may be longer. PPO has four roles, two losses and a
# correction for its sampler.
LONGER_ALGORITHMS = {"grpo": 130, "ppo": 130}

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no docstrings, comments or blank lines."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A string that stands alone is a docstring, of whatever it follows.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def test_code_lines_leave_out_docstrings_comments_and_blank_lines():
    source = (
        '"""A docstring\nof two lines."""\n'  # 1, 2
        "\n"  # 3
        "# A comment.\n"  # 4
        "x = (  # A comment behind code.\n"  # 5
        "    1\n"  # 6
        ")\n"  # 7
        "text = '''one\n\ntwo'''\n"  # 8, 9, 10: a string that is a value
    )
    assert code_lines(source) == {5, 6, 7, 8, 9, 10}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_have_at_most_500_lines(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, (
        f"{relative(path)} has {num_lines} lines; at most {MAX_FILE_LINES}. A file is"
        " one noun of the field: which second one has moved in?"
    )


@pytest.mark.parametrize("path", ALGORITHMS, ids=relative)
def test_an_algorithm_is_about_a_hundred_lines_of_code(path):
    limit = LONGER_ALGORITHMS.get(path.stem, MAX_ALGORITHM_LINES)
    num_lines = len(code_lines(path.read_text()))
    assert num_lines <= limit, (
        f"{relative(path)} has {num_lines} lines of code; at most {limit}. Move"
        " arithmetic that others could use to realjax/rl."
    )

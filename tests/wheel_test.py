"""An installed realjax works from any folder: both packages and the shipped configs."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {path.name for path in (ROOT / "configs").glob("*.py")}


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    """Runs a program to its end and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel of this working tree; building it needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--wheel-dir", folder, ROOT),
        cwd=folder,
    )
    (wheel,) = folder.glob("realjax-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The Python of an environment that holds the wheel, and its dependencies by path.

    The folder of the dependencies is one more line of the path, so its own .pth files,
    an editable realjax among them, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python3.*/site-packages")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--no-compile", wheel),
        cwd=folder,
    )
    dependencies = sysconfig.get_paths()["purelib"]
    (packages / "dependencies.pth").write_text(dependencies + "\n")
    return python


def test_the_wheel_holds_the_packages_and_the_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert folders == {"realjax", "pallas_kernels", f"realjax-{version}.dist-info"}
    shipped = {name for name in names if name.startswith("realjax/_configs/")}
    assert shipped == {f"realjax/_configs/{name}" for name in CONFIGS}
    assert not [name for name in names if name.endswith(".pyc")]


def test_installed_packages_import_from_any_folder(installed, tmp_path):
    program = "import realjax, pallas_kernels as p; print(realjax.__file__, p.__file__)"
    files = run(installed, "-c", program, cwd=tmp_path).split()
    environment = str(installed.parents[1])
    assert [file.startswith(environment) for file in files] == [True, True]


def test_an_installed_command_finds_its_config_from_any_folder(installed, tmp_path):
    # `configs/sft.py` is no file of this folder: the installed copy is meant.
    run(
        *(installed, "-m", "realjax.cli.train", "--config=configs/sft.py:debug"),
        *("--workdir", tmp_path / "run"),
        cwd=tmp_path,
    )
    assert any((tmp_path / "run").iterdir())
    assert not (tmp_path / "configs").exists()

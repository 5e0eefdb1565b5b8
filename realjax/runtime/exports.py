"""The Hugging Face folders that a run leaves behind.

runs/a/export/policy    a trained role, or one that follows it
"""

import pathlib

from realjax.runtime.agreement import Agreement
from realjax.runtime.console import Console
from realjax.runtime.parameters import ParameterStore
from realjax.runtime.run import Run
from realjax.runtime.weights import save_weights


def export(run: Run, store: ParameterStore, workdir: pathlib.Path) -> None:
    """Writes every role that calls change, as it is now.

    Args:
        run: whose roles they are.
        store: has their parameters.
        workdir: of the run; all processes call this.
    """
    for name in run.graph.changed_roles:
        folder = _folder(workdir, name)
        save_weights(folder, run.roles[name], store, run.tokenizer)


def tell_exports(
    run: Run, store: ParameterStore, workdir: pathlib.Path, console: Console
) -> None:
    """Says where the exports are; writes those that are not there.

    Args:
        run: as in `export`.
        store: likewise.
        workdir: likewise.
        console: is told.
    """
    folders = {role: _folder(workdir, role) for role in run.graph.changed_roles}
    are_there = lambda: all(folder.exists() for folder in folders.values())
    if not Agreement("exports that are there").decide(are_there):
        export(run, store, workdir)
    for role, folder in folders.items():
        console.print(f"exported {role} to {folder}")


def _folder(workdir: pathlib.Path, role: str) -> pathlib.Path:
    return workdir / "export" / role

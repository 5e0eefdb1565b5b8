"""Checkpoint folders of a run of several processes, which all of them write.

    all         tell each other what they hold, and divide it
    process 0   makes 120.orbax-checkpoint-tmp
    all         copy their pieces to the host      the arrays may change from here on
      in a thread of each:
    all         write their pieces, take checksums
    process 0   joins them, writes files.json, renames the folder, deletes old ones

They wait for each other on the host, before every line. Where one fails, all do, with
its words.
"""

import json
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from realjax.core.shared_folder import wait_to_see
from realjax.realloc.processes import handle
from realjax.runtime import manifest, named_arrays, shards
from realjax.runtime.agreement import Agreement
from realjax.runtime.saving_alone import TEMPORARY


class SavingTogether:
    """Writes one checkpoint at a time, in the background, as `SavingAlone` does.

    Every process makes one and calls the same methods.

    Args:
        folder: of the checkpoints; all processes see it.
        keep: complete ones that stay.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int):
        self._folder, self._keep = folder, keep
        self._agreement = Agreement("saves")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: Any, leaves: Mapping[str, Any]) -> None:
        """Copies this process's pieces of arrays to the host and starts to write.

        Args:
            step: names the folder.
            state: what JSON can hold; that of process 0 counts.
            leaves: arrays with elements, by name; handles where they lie elsewhere.
        """
        folder = self._folder / f"{step}{TEMPORARY}"
        process = jax.process_index()

        def begin() -> dict[str, Any]:
            if process == 0:
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "arrays").mkdir(parents=True)
            return shards.view(leaves)

        views = self._agreement.gather(begin)
        shards.check_alike(views)

        def copy() -> dict[shards.Piece, Any]:
            wait_to_see(folder / "arrays")
            return shards.copy_pieces(leaves, shards.pieces(leaves, views), process)

        data = self._agreement.together(copy)
        written = Agreement(f"save of step {step}")

        def work() -> None:
            try:
                self._write(step, state, data, views, written)
            except Exception as error:
                self._error = error

        # The process may end without it: what is not renamed counts for nothing.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Blocks until what was begun is done, and raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Reads arrays, each to the sharding of the leaf of its name.

        Of each the process reads what its devices hold; of one that is not here at all
        it returns a handle.
        """
        own = {name: leaf for name, leaf in wanted.items() if _is_here(leaf)}
        found = {
            name: handle(leaf.shape, leaf.dtype, leaf.sharding)
            for name, leaf in wanted.items()
            if name not in own
        }
        if own:
            handler = ocp.PyTreeCheckpointHandler()
            folder = self._folder / str(step) / "arrays"
            # The handler itself waits for nobody; the classes around it would.
            given = named_arrays.restoring(own)
            found |= handler.restore(cast(Any, folder), args=given)
        return found

    def forget(self) -> None:
        """Nothing is remembered of the folder."""

    def close(self) -> None:
        """Frees the thread."""
        if self._thread is not None:
            self._thread.join()

    def _write(
        self,
        step: int,
        state: Any,
        data: Mapping[shards.Piece, Any],
        views: shards.Views,
        written: Agreement,
    ) -> None:
        folder = self._folder / f"{step}{TEMPORARY}"
        process = jax.process_index()
        own = shards.own_folder(folder / "arrays", process)

        def write() -> dict[str, Any]:
            if views[0]:
                shards.write(folder / "arrays", data, views, process)
            return manifest.describe(folder, own)

        described = written.gather(write)

        def finish() -> None:
            if views[0]:
                shards.merge(folder / "arrays", views)
            else:
                (folder / "arrays").rmdir()
            (folder / "metadata").mkdir()
            text = json.dumps(state)
            (folder / "metadata" / "metadata").write_text(text, encoding="utf-8")
            known = {name: it for part in described for name, it in part.items()}
            manifest.write(folder, known=known)
            folder.rename(self._folder / str(step))
            self._delete_old()

        written.decide(finish)

    def _delete_old(self) -> None:
        names = (path.name for path in self._folder.iterdir() if path.is_dir())
        for step in sorted(int(name) for name in names if name.isdigit())[
            : -self._keep
        ]:
            # Never half a checkpoint under its name.
            old = self._folder / f"{step}{TEMPORARY}-old"
            (self._folder / str(step)).rename(old)
            shutil.rmtree(old, ignore_errors=True)


def _is_here(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or bool(sharding.addressable_devices)

"""Checkpoint folders of a run of one process, written and read by Orbax."""

import pathlib
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from realjax.runtime import manifest, named_arrays

TEMPORARY = ".orbax-checkpoint-tmp"
"""In the name of a folder that is being written, or was left by a kill."""

_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class SavingAlone:
    """Writes one checkpoint at a time, in the background.

    Args:
        folder: of the checkpoints.
        keep: complete ones that stay.
        read_only: nothing is written or deleted.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, read_only: bool):
        self._folder = folder
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                max_to_keep=keep,
                save_root_metadata=False,
                read_only=read_only,
                # Called between the last file and the rename.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_manifest
                ),
            ),
        )

    def save(self, step: int, state: Any, leaves: Mapping[str, Any]) -> None:
        """Copies arrays to the host and starts to write.

        Args:
            step: names the folder.
            state: what JSON can hold.
            leaves: arrays with elements, by name.
        """
        items: dict[str, Any] = {"metadata": ocp.args.JsonSave(state)}
        if leaves:
            items["arrays"] = ocp.args.PyTreeSave(dict(leaves))
        self._saving = step
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Blocks until what was begun is done, and raises what went wrong."""
        self._manager.wait_until_finished()

    def read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Reads arrays, each to the sharding of the leaf of its name."""
        composite = ocp.args.Composite(arrays=named_arrays.restoring(wanted))
        return dict(self._manager.restore(step, args=composite)["arrays"])

    def forget(self) -> None:
        """Looks at the folder anew: checkpoints were renamed or deleted."""
        self._manager.reload()

    def close(self) -> None:
        """Frees the threads."""
        self._manager.close()

    def _write_manifest(self) -> None:
        (folder,) = self._folder.glob(f"{self._saving}{TEMPORARY}*")
        manifest.write(folder, leave_out=_WRITTEN_LATER)

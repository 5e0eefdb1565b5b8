"""Everything a run needs to go on, written so that a kill at any moment loses little.

    <folder>/120/arrays/…         every array of the run, by Orbax
    <folder>/120/metadata/…       what is not an array, as JSON
    <folder>/120/files.json       size and checksum of every file above
    <folder>/130.orbax-checkpoint-tmp/…      being written, or left by a kill

A save copies the arrays to the host, returns, and writes in the background; the folder
gets its name, in one rename, when all is on disk. So a folder named by a number is
complete, unless something damaged it later, which the sizes and checksums tell.

The processes of a run share the folder, and each writes what its devices hold.

Arrays are named by their path in the trees ("policy/layers/mlp/up/kernel") and are
restored to whatever shardings the caller asks for, exactly, or not at all.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import PyTree
from realjax.runtime import manifest, named_arrays
from realjax.runtime.agreement import Agreement
from realjax.runtime.checkpoint_errors import (
    CheckpointError,
    DamagedCheckpointError,
    FailedSaveError,
    MismatchedCheckpointError,
    NoCheckpointError,
    is_full_disk,
    shorten,
)
from realjax.runtime.saving_alone import TEMPORARY, SavingAlone
from realjax.runtime.saving_together import SavingTogether

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "DamagedCheckpointError",
    "FailedSaveError",
    "MismatchedCheckpointError",
    "NoCheckpointError",
    "Restored",
]

type Arrays = Mapping[str, PyTree]
type RealShapes = Mapping[str, Sequence[int | None]]
type Path = str | os.PathLike[str]

logger = logging.getLogger(__name__)

_NUM_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save; of several rules, any. 0 turns a rule off.

    Attributes:
        every_steps: whenever the step is a multiple of it.
        every_minutes: when that long has passed since the last save.
        every_epochs: at the end of epochs whose number is a multiple of it.
        keep: complete checkpoints that stay; older ones are deleted.
        export: whether each save also writes Hugging Face folders.
    """

    every_steps: int = 0
    every_minutes: float = 0.0
    every_epochs: int = 0
    keep: int = 2
    export: bool = True

    def __post_init__(self):
        """Refuses what cannot be meant."""
        for name in ("every_steps", "every_minutes", "every_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 turns it off.")
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; at least 1 checkpoint must stay.")

    def is_due(
        self,
        *,
        step: int,
        epoch: int = 0,
        is_epoch_end: bool = False,
        minutes_since_save: float = 0.0,
    ) -> bool:
        """Whether to save after `step`.

        Args:
            step: steps done, from 1.
            epoch: epochs done when `is_epoch_end`, from 1.
            is_epoch_end: whether the step ended an epoch.
            minutes_since_save: since the last save, or since the start.
        """
        return bool(
            (self.every_steps and step % self.every_steps == 0)
            or (self.every_minutes and minutes_since_save >= self.every_minutes)
            or (self.every_epochs and is_epoch_end and epoch % self.every_epochs == 0)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        step: which.
        arrays: the trees that were asked for.
        metadata: what was saved beside them.
    """

    step: int
    arrays: dict[str, PyTree]
    metadata: dict[str, Any]


class Checkpointer:
    """Saves and restores the arrays and the metadata of a run.

    Every process of a run makes one and calls the same methods in the same order; what
    one finds in the folder, all find, and what fails in one fails in all. What killed
    saves left is removed at the start.

    Args:
        folder: holds one folder per checkpoint; all processes see it.
        keep: complete checkpoints that stay.
        read_only: never writes; for those who read the checkpoints of a live run.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
        self.folder = pathlib.Path(folder).absolute()
        self._keep, self._is_read_only = keep, read_only
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        self._saving: int | None = None
        self._saving_bytes = 0
        self._agreement = Agreement(
            "checkpoints",
            errors=(NoCheckpointError, DamagedCheckpointError, CheckpointError),
        )
        if not read_only:
            self._agreement.decide(self._prepare_folder)
        self._files = self._open_files()

    def save(self, step: int, arrays: Arrays, metadata: Mapping[str, Any]) -> bool:
        """Starts to save; waits for the save before it to end.

        The arrays may be changed, donated or deleted as soon as this returns.

        Args:
            step: names the checkpoint.
            arrays: trees of jax arrays, numpy arrays and numbers. Typed keys go in as
                `jax.random.key_data`. What lies on devices of other processes alone
                is given by its handle; what each process has a copy of, the first
                one's is saved.
            metadata: what JSON can hold; that of process 0 is saved.

        Returns:
            False if the step is saved already.

        Raises:
            FailedSaveError: this save, or the one before it, could not be written.
            TypeError: naming a leaf or an entry that cannot be saved.
        """
        leaves = named_arrays.flatten(arrays)
        self.wait()
        if self._agreement.decide(lambda: self._is_saved(step)):
            return False
        described = {name: [list(x.shape), str(x.dtype)] for name, x in leaves.items()}
        stored = {name: leaf for name, leaf in leaves.items() if leaf.size > 0}
        state = {"metadata": _as_json(metadata, "metadata"), "arrays": described}
        self._saving = step
        self._saving_bytes = sum(leaf.nbytes for leaf in stored.values())
        with self._save_errors():
            self._files.save(step, state, stored)
        return True

    def wait(self) -> None:
        """Blocks until the save under way is complete.

        Raises:
            FailedSaveError: if it could not be written.
        """
        with self._save_errors():
            self._files.wait()
        self._saving = None

    def close(self) -> None:
        """Waits and frees the threads."""
        try:
            self.wait()
        finally:
            self._files.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, damaged ones included, in order."""
        return self._agreement.decide(self._steps)

    def latest_step(self) -> int | None:
        """The last checkpoint whose files are all there with their sizes."""
        return self._agreement.decide(self._latest_step)

    def read_metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        return self._agreement.decide(lambda: self._read_state(step)["metadata"])

    def read_shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array, by its path."""
        arrays = self._agreement.decide(lambda: self._read_state(step)["arrays"])
        return {
            name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
            for name, (shape, dtype) in arrays.items()
        }

    def restore(
        self, step: int, abstract: Arrays, *, real: RealShapes | None = None
    ) -> dict[str, PyTree]:
        """Reads trees of a checkpoint, onto the shardings that are asked for.

        Args:
            step: which checkpoint.
            abstract: trees like those that were saved; some of them, if only these are
                needed. A leaf has a shape and a dtype; with a sharding (also of other
                devices or another memory kind than when saved) it is read straight to
                it, each process what its devices hold; without one it becomes a numpy
                array.
            real: of arrays with padding, which another allocation may need more or less
                of: by name, the size of each dimension that may end in zeros, and None
                for the others.

        Raises:
            NoCheckpointError: there is none of this step.
            DamagedCheckpointError: naming the file.
            MismatchedCheckpointError: naming arrays, and both shapes or dtypes.
        """
        self._agreement.decide(lambda: self._check_sizes(step))
        self._check_sums(step)
        wanted = named_arrays.flatten(abstract)
        self._check_match(step, list(abstract), wanted, real or {})
        stored = {name: leaf for name, leaf in wanted.items() if np.prod(leaf.shape)}
        found = self._read_arrays(step, stored) if stored else {}
        for name in wanted.keys() - stored.keys():
            found[name] = named_arrays.without_elements(wanted[name])
        return named_arrays.unflatten(abstract, found)

    def restore_latest(
        self,
        abstract: Arrays | Callable[[dict[str, Any]], Arrays],
        *,
        real: RealShapes | None = None,
    ) -> Restored:
        """Reads the last checkpoint that can be read.

        One that is damaged is named in the log, renamed to `damaged-<step>`, and the
        one before it is read.

        Args:
            abstract: as for `restore`, or a function that makes it from the metadata.
            real: as for `restore`.

        Raises:
            NoCheckpointError: there is none, or each is damaged.
            MismatchedCheckpointError: the last one is of another model.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        steps = self.steps()
        for step in reversed(steps):
            try:
                metadata = self.read_metadata(step)
                trees = abstract(metadata) if callable(abstract) else abstract
                arrays = self.restore(step, trees, real=real)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                self._agreement.decide(lambda o=other, e=error: self._set_aside(o, e))
            logger.info("Restored step %d from %s.", step, self.folder)
            return Restored(step=step, arrays=arrays, metadata=metadata)
        reasons = "".join(f"\n  {error}" for error in damaged.values())
        raise NoCheckpointError(
            f"There is no complete checkpoint in {self.folder}.{reasons}"
        )

    def discard_after(self, step: int) -> None:
        """Deletes later checkpoints: a run goes on from `step` by choice."""
        self.wait()
        self._agreement.decide(lambda: self._delete_after(step))

    # Below: files. What one process does for all stands in `decide`.

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_temporary()

    def _open_files(self) -> SavingAlone | SavingTogether:
        if self._num_processes > 1:
            return SavingTogether(self.folder, keep=self._keep)
        return SavingAlone(self.folder, keep=self._keep, read_only=self._is_read_only)

    def _remove_temporary(self) -> None:
        for path in self.folder.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self.folder.exists():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def _latest_step(self) -> int | None:
        for step in reversed(self._steps()):
            try:
                self._check_sizes(step)
                return step
            except DamagedCheckpointError as error:
                logger.warning("%s It is passed over.", error)
        return None

    def _is_saved(self, step: int) -> bool:
        if not (self.folder / str(step)).exists():
            return False
        try:
            self._check_sizes(step)
            return True
        except DamagedCheckpointError as error:
            self._set_aside(step, error)
            return False

    def _delete_after(self, step: int) -> None:
        for later in self._steps():
            if later > step and not self._is_read_only:
                shutil.rmtree(self.folder / str(later))
        self._files.forget()

    def _check_sizes(self, step: int) -> None:
        folder = self.folder / str(step)
        if not folder.exists():
            found = ", ".join(map(str, self._steps())) or "none"
            raise NoCheckpointError(
                f"There is no checkpoint of step {step} in {self.folder}; steps there: "
                f"{found}."
            )
        if damage := manifest.find_damage(folder, checksums=False):
            raise DamagedCheckpointError(damage)

    def _check_sums(self, step: int) -> None:
        """Every process reads some of the files."""
        share = self._process, self._num_processes
        found = self._agreement.gather(
            lambda: manifest.find_damage(self.folder / str(step), share=share)
        )
        for damage in found:
            if damage:
                raise DamagedCheckpointError(damage)

    def _read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._agreement.together(lambda: self._files.read(step, wanted))
        except Exception as error:
            # Not damage: the checksums were right. No memory, say.
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} is whole and could not be "
                f"restored: {shorten(error)}"
            ) from error

    def _read_state(self, step: int) -> dict[str, Any]:
        self._check_sizes(step)
        path = self.folder / str(step) / "metadata" / "metadata"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(f"{path} is damaged: {error}.") from error

    def _set_aside(self, step: int, error: DamagedCheckpointError) -> None:
        """Renames a damaged checkpoint, so that it counts no more."""
        target = self.folder / f"damaged-{step}"
        logger.warning("%s The checkpoint is now %s.", error, target)
        if not self._is_read_only:
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
        self._files.forget()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turns what is raised into `FailedSaveError`; the next save can work."""
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            # Closing would raise the same error again.
            with contextlib.suppress(Exception):
                self._files.close()
            if self._process == 0 and not self._is_read_only:
                self._remove_temporary()
            self._files = self._open_files()
            raise FailedSaveError(self._explain(step, error)) from error

    def _explain(self, step: int | None, error: Exception) -> str:
        latest = self._latest_step()
        stands = (
            "There is no earlier one."
            if latest is None
            else f"The checkpoint of step {latest} is complete and stays."
        )
        if is_full_disk(error):
            free = shutil.disk_usage(self.folder).free >> 20
            return (
                f"The disk of {self.folder} is full: the checkpoint of step {step} "
                f"needs up to {self._saving_bytes >> 20} MiB, and {free} MiB are free. "
                f"{stands} Free some space, or keep fewer checkpoints."
            )
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: "
            f"{shorten(error)}. {stands}"
        )

    def _check_match(
        self,
        step: int,
        trees: list[str],
        wanted: Mapping[str, Any],
        real: RealShapes,
    ) -> None:
        there = self.read_shapes(step)
        there = {name: x for name, x in there.items() if name.split("/")[0] in trees}
        problems = [
            f"{name} is {x.dtype}{list(x.shape)} here and "
            f"{there[name].dtype}{list(there[name].shape)} there"
            for name, x in wanted.items()
            if name in there and not _is_match(x, there[name], real.get(name))
        ]
        problems += [f"{name} is not there" for name in wanted if name not in there]
        problems += [f"{name} is only there" for name in there if name not in wanted]
        if problems:
            shown = "".join(f"\n  {problem}" for problem in problems[:_NUM_SHOWN])
            more = len(problems) - _NUM_SHOWN
            raise MismatchedCheckpointError(
                f"The checkpoint {self.folder / str(step)} is of another model or "
                f"optimizer:{shown}"
                + (f"\n  and {more} more." if more > 0 else "")
                + "\nUse the config that it was made with, or another work folder."
            )


def _is_match(here: Any, there: Any, real: Sequence[int | None] | None) -> bool:
    """Whether two arrays are alike but for the padding at the end of dimensions."""
    if here.dtype != there.dtype or len(here.shape) != len(there.shape):
        return False
    sizes = zip(here.shape, there.shape, real or (None,) * here.ndim, strict=True)
    return all(a == b or (n is not None and min(a, b) >= n) for a, b, n in sizes)


def _as_json(value: Any, path: str) -> Any:
    """`value` as JSON will give it back, or an error that names what it cannot hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"{path} has the key {key!r}; JSON would turn it into a string. "
                    "Use strings."
                )
        return {key: _as_json(item, f"{path}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{path} is {type(value).__name__}, which JSON cannot hold. Arrays go into "
        "`arrays`."
    )

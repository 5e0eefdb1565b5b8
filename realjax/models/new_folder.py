"""A folder that appears under its name only when it is complete.

Everything is written into a sibling folder that takes the name at the end: a process
killed at any moment leaves the old folder, if any, or the new one (between two renames:
the old one as `.NAME.old`), never half of one.
"""

import os
import shutil
from pathlib import Path

from realjax.models.checkpoint_config import CONFIG_FILE, old_path

TENSOR_ENDS = (".safetensors", ".bin")


class NewFolder:
    """A checkpoint folder in the making.

    Attributes:
        path: the name it will have.
        partial: the folder to write into.
    """

    def __init__(self, path: str | Path, *, config_file: str = CONFIG_FILE):
        """Make nothing yet.

        Where the path is a link, what it leads to is replaced, and the link stays.

        Args:
            path: of the folder.
            config_file: that a checkpoint of this kind has.

        Raises:
            FileExistsError: if there is something that is not a checkpoint.
        """
        self.path = Path(os.path.realpath(path))
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        if self.path.exists() and (why := _why_kept(self.path, config_file)):
            raise FileExistsError(
                f"{self.path} {why}; it will not be replaced by a checkpoint. Choose"
                " another folder."
            )

    def begin(self) -> Path:
        """Make the empty folder to write into."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def discard(self) -> None:
        """Remove what was written, if that cannot be finished."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> None:
        """Give the folder its name; what had it before is gone."""
        old = old_path(self.path)
        if self.path.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
        self.partial.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)


def _why_kept(path: Path, config_file: str) -> str:
    """Say what speaks against replacing a path; "" if it is empty or a checkpoint.

    All that is in a folder goes with it, and many a project has a config.json.
    """
    if not path.is_dir():
        return "is a file"
    entries = sorted(path.iterdir())
    if not entries:
        return ""
    if not (path / config_file).exists():
        return f"is not empty and holds no {config_file}"
    if folders := [entry.name for entry in entries if entry.is_dir()]:
        return f"holds the folder {folders[0]!r}, which a checkpoint has not"
    has_tensors = any(entry.name.endswith(TENSOR_ENDS) for entry in entries)
    return "" if has_tensors else f"holds a {config_file} and no tensors"

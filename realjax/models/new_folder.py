"""A folder that appears under its name only when it is complete.

Everything is written into a sibling folder that takes the name at the end: a process
killed at any moment leaves the old folder, if any, or the new one (between two renames:
the old one as `.NAME.old`), never half of one.
"""

import os
import shutil
from pathlib import Path

from realjax.models.checkpoint_config import CONFIG_FILE


class NewFolder:
    """A checkpoint folder in the making.

    Attributes:
        path: the name it will have.
        partial: the folder to write into.
    """

    def __init__(self, path: str | Path):
        """Make nothing yet.

        Raises:
            FileExistsError: if the folder holds something that is not a checkpoint.
        """
        self.path = Path(os.path.abspath(path))
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        is_full = self.path.is_dir() and any(self.path.iterdir())
        if is_full and not (self.path / CONFIG_FILE).exists():
            raise FileExistsError(
                f"{self.path} is not empty and holds no {CONFIG_FILE}; it will not be"
                " replaced by a checkpoint. Choose another folder."
            )

    def begin(self) -> Path:
        """Make the empty folder to write into."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def finish(self) -> None:
        """Give the folder its name; what had it before is gone."""
        old = self.path.with_name(f".{self.path.name}.old")
        if self.path.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
        self.partial.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

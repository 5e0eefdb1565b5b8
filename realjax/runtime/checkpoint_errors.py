"""What can be wrong with checkpoints, and how the errors of others are told."""

import errno
import os


class CheckpointError(RuntimeError):
    """Something about a checkpoint that a person must know."""


class NoCheckpointError(CheckpointError):
    """There is nothing to restore."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, truncated or changed."""


class MismatchedCheckpointError(CheckpointError):
    """The checkpoint is of another model, optimizer or data type."""


class FailedSaveError(CheckpointError):
    """A checkpoint could not be written; the earlier ones stand."""


def shorten(error: Exception) -> str:
    """Both ends of an error's text: TensorStore says what first, and why last."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 400 else f"{text[:150]} … {text[-250:]}"


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that there is no room."""
    while error is not None:
        for code in (errno.ENOSPC, errno.EDQUOT):
            # What TensorStore raises has the words and not the number.
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return True
        error = error.__cause__ or error.__context__
    return False

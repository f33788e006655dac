"""last.ckpt: tensors and plain data, written whole or not at all, read without running anything."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from afds.errors import RunFolderError
from afds.files import go_on


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside the old one, flush to disk, then replace it in one step.

    Raises:
        RunFolderError: no room, or no right to write there; the old one stays.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer has errors of its own
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # the writer fell over it
            raise KeyboardInterrupt from error
        reason = getattr(error, "strerror", None) or "no space left, perhaps"
        raise RunFolderError(f"{path} cannot be written ({reason}). {go_on(path)}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU.

    Raises:
        RunFolderError: the file is missing, cut short or not a checkpoint of afds.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing: there is nothing to resume.") from None
    except Exception as error:
        raise RunFolderError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it was cut short or "
                             "changed. Start the run again in a new folder.") from error  # fmt: skip
    whole = isinstance(state, dict) and {"epoch", "stage", "task", "optimizer"} <= set(state)
    if not whole or type(state["epoch"]) is not int or type(state["stage"]) is not int:
        raise RunFolderError(f"{path} is not a checkpoint of afds.")
    return state

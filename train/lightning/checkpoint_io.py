"""Checkpoint files that are whole or not there: written beside their place, then put there at
once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from configs.command_line.endings import about
from modules.runtime.files import PARTIAL, whole_file


class SiblingCheckpointIO(TorchCheckpointIO):
    """Lightning's files, written to the folder they belong to.

    Lightning writes to the system's temporary folder first; from there to another file system a
    move is a copy, and a kill in the middle of it leaves neither the old checkpoint nor the new
    one. Within a folder it is one rename.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a file beside it, have that on the disk, and rename it.

        Raises:
            OSError: the disk did not take it; the file that was there before still is.
        """
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(place) as partial, about(place), partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            # torch answers a full disk with an error of its own ("unexpected pos"), behind which is
            # the disk's.
            refused = error.__context__
            if isinstance(refused, OSError):
                raise OSError(refused.errno, refused.strerror, str(place)) from error
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete what kills left half written in a folder of checkpoints; nobody may be writing."""
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink()

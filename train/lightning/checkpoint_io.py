"""Atomic checkpoint files: written to a temporary file in the same folder, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from configs.command_line.endings import about
from modules.runtime.files import PARTIAL, whole_file


class SiblingCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written through a temporary file in their own folder.

    Lightning writes to the system's temporary folder first. A move to another file system is a
    copy, and a kill during it leaves neither the old checkpoint nor the new one. Within a folder a
    move is one atomic rename.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a temporary file, flush it to the disk, and rename it.

        Raises:
            OSError: the disk is full or refuses; the previous file is unchanged.
        """
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(place) as partial, about(place), partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            # torch raises its own error for a full disk ("unexpected pos"); the disk's is its
            # context.
            refused = error.__context__
            if isinstance(refused, OSError):
                raise OSError(refused.errno, refused.strerror, str(place)) from error
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete partial files of killed processes in a folder of checkpoints that nobody writes to."""
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink()

"""Two processes of one training, started as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
LIMIT, GRACE = 1200.0, 60.0
"""Seconds that all may take, and that one is given to end by itself when the other has failed."""


def launch(
    module: str, folder: Path, *arguments: str, limit: float = LIMIT
) -> list[tuple[int, str]]:
    """Exit status and stderr of either process; a process that does not end is killed.

    Args:
        module: what `python -m` runs. folder: its first argument. arguments: the others.
        limit: seconds.
    """
    port = free_port()
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
    said = [folder / f"stderr-{port}-{rank}" for rank in range(2)]
    running = []
    for rank, file in enumerate(said):
        with file.open("w") as stderr:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(folder), *arguments],
                    cwd=ROOT,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            )
    _wait(running, limit)
    return [
        (process.returncode, file.read_text()) for process, file in zip(running, said, strict=True)
    ]


def _wait(running: list[subprocess.Popen[bytes]], limit: float) -> None:
    end = time.monotonic() + limit
    while any(process.poll() is None for process in running) and time.monotonic() < end:
        if any(process.poll() for process in running):
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.1)
    for process in running:
        process.kill()
        process.wait()

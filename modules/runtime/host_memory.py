"""What the machine itself has left."""

from __future__ import annotations

from pathlib import Path

MEMORY = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that can be had here, reclaimable caches included; without limit where the system does
    not say.
    """
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return 1 << 62
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return 1 << 62 if found is None else int(found.split()[1]) * 1024

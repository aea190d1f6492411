"""Available memory of the machine."""

from __future__ import annotations

from pathlib import Path

MEMORY = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that can be allocated, reclaimable caches included; 2^62 where the system does not
    report it.
    """
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return 1 << 62
    entry = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return 1 << 62 if entry is None else int(entry.split()[1]) * 1024

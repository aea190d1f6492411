"""Running a program that a model wrote, with its tests: limits, and bubblewrap where it is
installed.

Without bubblewrap the limits contain accidents, not attacks: a program can read files and reach the
network, and a child that starts a new session outlives it. See docs/security.md.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

LARGEST_FILE = 64 << 20
"""Largest size in bytes of a file that a program writes."""
MORE_PROCESSES = 32
"""Processes and threads that a program may add to those of its user; root has no such limit."""


def passes(program: str, test: str, seconds: float = 5.0, memory: int = 1 << 30) -> bool:
    """Whether a program and its test run to the end in a separate process (Chen et al. 2021,
    HumanEval).

    The last line writes a random word: a program that exits before the end of its test has failed,
    whatever its exit status. The process has limits on time (seconds), memory (bytes), file size
    and processes, an empty home folder, no environment, and its own session, which is killed at the
    end.
    """
    word = secrets.token_hex(16)
    reads, writes = os.pipe()
    with tempfile.TemporaryDirectory() as folder, open(reads, "rb") as pipe:
        # 1. Append a line that proves the end.
        script = Path(folder) / "candidate.py"
        last = f"__import__('os').write({writes}, b'{word}')"
        script.write_text(f"{program}\n\n{test}\n\n{last}\n", encoding="utf-8", errors="replace")
        # 2. Run it, and close our end for writing.
        try:
            ended = _run(script, writes, seconds, _Limits(int(seconds) + 1, memory))
        finally:
            os.close(writes)
        if not ended:
            return False
        # A child that left the session may still hold the pipe: read what is there, wait for
        # nothing.
        os.set_blocking(reads, False)
        return pipe.read(len(word)) == word.encode()


def _run(script: Path, pipe: int, seconds: float, limits: _Limits) -> bool:
    """Whether the script exited with status 0 in time. Its whole session is killed afterwards."""
    started = subprocess.Popen(
        [*bubblewrap(script.parent), sys.executable, "-I", str(script)],
        cwd=script.parent,
        env={"HOME": str(script.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(pipe,),
        start_new_session=True,
        preexec_fn=limits,
    )
    # The whole session is killed, also after a program that ended in time.
    try:
        return started.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def bubblewrap(folder: Path) -> list[str]:
    """The prefix of a command that confines it to `folder`, without network; empty where bubblewrap
    does not work.
    """
    if not _works():
        return []
    # New namespaces, everything read-only except for the folder and an empty /tmp.
    return [
        str(shutil.which("bwrap")),
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/",
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "--tmpfs",
        "/tmp",
        "--bind",
        str(folder),
        str(folder),
        "--chdir",
        str(folder),
    ]


@cache
def _works() -> bool:
    path = shutil.which("bwrap")
    if path is None:
        return False
    tried = [path, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def isolation() -> str:
    """How programs are isolated on this machine, for the report."""
    if _works():
        return "bubblewrap (no network, read-only files, separate processes) and limits"
    return "limits only (no sandbox: files and network can be reached)"


class _Limits:
    """Sets the limits in the child process, before the program starts."""

    def __init__(self, seconds: int, memory: int) -> None:
        self.limits = {
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_AS: memory,
            resource.RLIMIT_FSIZE: LARGEST_FILE,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: _own_threads() + MORE_PROCESSES,
        }

    def __call__(self) -> None:
        for name, value in self.limits.items():
            hard = resource.getrlimit(name)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (most, most))


def _own_threads() -> int:
    """Processes and threads of this user; the limit of processes counts both."""
    count = 0
    for entry in os.scandir("/proc") if Path("/proc/self").exists() else ():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count

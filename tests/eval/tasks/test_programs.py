"""Programs of models, in real processes: an early exit is no pass, nothing outlives them, limits
hold.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest

from eval.tasks import programs
from eval.tasks.programs import isolation, passes


@pytest.fixture(autouse=True)
def fresh() -> None:
    programs._works.cache_clear()


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    assert passes("def double(n):\n    return 2 * n", "assert double(2) == 4")
    assert passes("from __future__ import annotations\nprint('x' * 100_000)", "assert True")
    assert not passes("def double(n):\n    return n", "assert double(2) == 4")
    assert not passes("def double(n) return n", "")


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "exit()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import threading, os\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
        "import sys\nsys.excepthook = lambda *_: __import__('os')._exit(0)",
    ],
)
def test_an_early_exit_is_no_pass(program: str) -> None:
    assert not passes(program, "assert False")


@pytest.mark.parametrize(
    "ending", ["", "while True: pass", "raise SystemExit", "import os; os._exit(1)"]
)
def test_children_do_not_outlive_it(ending: str, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile "
        f"not __import__('os').path.exists({str(mark)!r}): "
        f"time.sleep(0.01)\ntime.sleep(0.1)\n{ending}"
    )
    assert passes(program, "", seconds=2.0) == (ending == "")
    pid = int(mark.read_text())
    for _ in range(100):
        if not _alive(pid):
            break
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_child_that_left_the_session_is_not_waited_for() -> None:
    program = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(3)'], start_new_session=True)"
    )
    assert passes(program, "")


def test_limits_hold(tmp_path: Path) -> None:
    assert not passes("while True:\n    pass", "", seconds=1.0)
    assert not passes("block = bytearray(1 << 31)", "", memory=1 << 29)
    place = tmp_path / "large"
    assert not passes(f"open({str(place)!r}, 'wb').write(bytes(80 << 20))", "")
    assert place.stat().st_size <= programs.LARGEST_FILE
    told = tmp_path / "limits"
    assert passes(
        f"import resource\nopen({str(told)!r}, 'w').write("
        "str([resource.getrlimit(n)[0] for n in (resource.RLIMIT_NPROC, resource.RLIMIT_CORE)]))",
        "",
    )
    assert "-1" not in told.read_text() and told.read_text().endswith(", 0]")


def test_its_environment_and_home_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    test = "import os\nassert set(os.environ) <= {'HOME', 'LC_CTYPE', 'PWD'}\n"
    assert passes("", test + "assert os.listdir('.') == ['candidate.py']")


def test_bubblewrap_is_used_where_it_works_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sandbox" in isolation() and passes("", "")
    programs._works.cache_clear()
    log, fake = tmp_path / "log", tmp_path / "bwrap"
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\nwith open({str(log)!r}, 'a') as log:\n"
        "    log.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "if sys.argv[-1] != 'true': os.execv(sys.argv[-3], sys.argv[-3:])\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    assert passes("", "assert True") and not passes("", "assert False")
    assert "bubblewrap" in isolation()
    last = log.read_text().splitlines()[-1]
    assert all(
        word in last
        for word in ("--unshare-all", "--die-with-parent", "--ro-bind / /", "--proc /proc")
    )
    programs._works.cache_clear()
    fake.write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    assert "no sandbox" in isolation()
    programs._works.cache_clear()
    assert os.environ["PATH"] == str(tmp_path)

"""An empty environment beside this one, and a copy of what an installation is built from."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

from tests.test_style import ROOMS, ROOT

SHIPPED = (*ROOMS, "slipstream", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_QUIET": "1",
}
"""Settings of pip by which it installs from a folder with what is installed already. A zero says
that there is no isolation: pip reads this variable as the value of the flag.
"""


def copy_of_the_project(folder: Path) -> Path:
    """What a source distribution would hold; building in a checkout leaves files there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def empty_environment(folder: Path) -> Path:
    """A virtual environment's `bin`, with this environment's packages but without this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (inside,) = folder.glob("lib/python*/site-packages")
    # Files ending in .pth are read in `inside` only, so no editable installation comes along.
    (inside / "packages.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m pip "$@"\n')
    pip.chmod(0o755)
    return folder / "bin"


def variables(bin: Path) -> dict[str, str]:
    """Environment variables of a shell in that environment; no path leads to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, **OFFLINE, "PATH": f"{bin}:{os.environ['PATH']}"}

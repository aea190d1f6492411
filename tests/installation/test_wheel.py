"""The built wheel, installed into a fresh environment: one top-level name, commands that start
beside a user's own `data.py`, one copy of every module.
"""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.installation.places import copy_of_the_project, empty_environment, variables
from tests.test_style import ROOT

SAME = """
import sys
import slipstream.configs.command_line.redaction as inside
import configs.command_line.redaction as outside
from slipstream.checkpoints.markdown import plain
from slipstream.configs.command_line.loading import CONFIGS
import slipstream.modules, modules
assert inside is outside and inside.__spec__.name == "configs.command_line.redaction"
assert plain is sys.modules["checkpoints.markdown"].plain and slipstream.modules is modules
assert "site-packages" in modules.__file__ and (CONFIGS / "drafters" / "clover.yaml").is_file()
try:
    import slipstream.data.nothing
except ModuleNotFoundError as error:
    assert error.name == "data.nothing"
"""
TAKEN = "import sys, types; sys.modules['data'] = types.ModuleType('data'); import slipstream"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", reason="the wheel is built without a network")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_project(folder / "source")
    command = ["pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, env=variables(empty_environment(folder / "building")))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def bin(wheel: Path, tmp_path_factory) -> Path:
    bin = empty_environment(tmp_path_factory.mktemp("environment"))
    subprocess.run(["pip", "install", "--no-deps", str(wheel)], check=True, env=variables(bin))
    return bin


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A user's folder, with names that are packages of this project."""
    for name in ("data.py", "train.py", "eval.py"):
        (tmp_path / name).write_text("raise RuntimeError('the user has this file')\n")
    (tmp_path / "modules").mkdir()
    return tmp_path


def ran(bin: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=variables(bin), capture_output=True, text=True)


def test_one_name_and_every_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "slipstream",
        "slipstream_decoding",
    }
    shipped = {name for name in names if name.startswith("slipstream/_packages/configs/")}
    present = [path for path in (ROOT / "configs").rglob("*") if path.suffix in {".py", ".yaml"}]
    assert len(shipped) == len(present) + 1, "and the README"


def test_one_copy_of_each_module(bin: Path, tmp_path: Path) -> None:
    done = ran(bin, tmp_path, "python", "-c", SAME)
    assert done.returncode == 0, done.stderr


def test_a_users_module_of_the_same_name_is_named(bin: Path, tmp_path: Path) -> None:
    done = ran(bin, tmp_path, "python", "-c", TAKEN)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: slipstream has a package 'data', but <module 'data'>")


@pytest.mark.slow
def test_commands_start(bin: Path, own_folder: Path) -> None:
    done = ran(bin, own_folder, "slipstream-train", "--config", "medusa.yaml", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "class_path: modules.drafters.heads.medusa.Medusa" in done.stdout
    done = ran(bin, own_folder, "slipstream-eval", "--compare", "a.json", "b.json")
    assert done.returncode == 2 and "a.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_other_command_starts_behind_the_package(bin: Path, own_folder: Path) -> None:
    start = ("python", "-m", "slipstream")
    done = ran(bin, own_folder, *start, "eval.project", "nowhere", "--hardware", "h100")
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    done = ran(bin, own_folder, *start, "os")
    assert done.returncode == 1 and "MODULE is one of checkpoints" in done.stderr

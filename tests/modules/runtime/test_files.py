"""A folder is whole or as it was, whatever ends its writer; files have the mode that the umask
gives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.folders import write_tensors
from modules.drafters.retrieval.suffix_array import Datastore
from modules.runtime import files
from modules.runtime.files import as_umask_says, clear_scratch, whole_folder
from modules.target import loading

ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str) -> None:
    with whole_folder(folder) as fresh:
        (fresh / "a").write_text(text)


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path != folder]


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the system's exchange of two names, and without it."""
    if not request.param:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    return request.param


def test_a_folder_is_replaced_whole(tmp_path: Path, exchange: bool) -> None:
    folder = tmp_path / "x"
    for text in ("1", "2", "3"):
        write(folder, text)
        assert (folder / "a").read_text() == text and not left(folder)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_end_at_any_rename_leaves_the_old_folder(
    error: BaseException, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename, calls = tmp_path / "x", Path.rename, []
    write(folder, "old")

    def ending(path: Path, to: Path) -> Path:
        calls.append(path.name)
        if at == len(calls):
            raise error
        renamed = rename(path, to)
        if at == 0 and len(calls) == 1:
            raise error
        return renamed

    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(Path, "rename", ending)
    with pytest.raises(type(error)):
        write(folder, "new")
    assert (folder / "a").read_text() == "old" and not left(folder)


def test_an_end_inside_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(folder, "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as fresh:
        (fresh / "a").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "a").read_text() == "old" and not left(folder)


KILLED = """
import os, sys
from pathlib import Path
from modules.runtime import files
from modules.target import loading
folder = Path(sys.argv[1])
if sys.argv[2] == "between":
    files._exchanged = lambda *_: False
    rename = Path.rename
    Path.rename = lambda self, to: rename(self, to) and os.kill(os.getpid(), 9)
with files.whole_folder(folder) as fresh:
    (fresh / "a").write_text("new")
    if sys.argv[2] == "inside":
        os.kill(os.getpid(), 9)
    if sys.argv[2] == "wait":
        print("ready", flush=True)
        sys.stdin.read()
"""


def writer(folder: Path, where: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), where],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize("where", ["inside", "between"])
def test_what_a_kill_leaves_is_cleared_and_the_old_folder_is_back(
    where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    write(folder, "old")
    process = writer(folder, where)
    process.communicate()
    assert process.returncode == -9 and left(folder)
    clear_scratch(folder)
    assert (folder / "a").read_text() == "old" and not left(folder)


def test_the_scratch_of_a_living_process_stays(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (tmp_path / ".x-y-12345678.scratch").mkdir()
    process = writer(folder, "wait")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    write(folder, "mine")
    process.communicate("")
    assert process.returncode == 0 and (folder / "a").read_text() == "new"


def test_readers_always_find_one_of_two_writers_folders(tmp_path: Path) -> None:
    folder, ended, missing = tmp_path / "x", threading.Event(), []
    refused: list[OSError] = []
    write(folder, "0")

    def read() -> None:
        while not ended.is_set():
            if not folder.exists():
                missing.append(1)

    def again() -> None:
        for number in range(100):
            try:
                write(folder, str(number))
            except OSError as error:
                refused.append(error)

    reader, writers = (
        threading.Thread(target=read),
        [threading.Thread(target=again) for _ in range(2)],
    )
    reader.start()
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    ended.set()
    reader.join()
    assert not missing and not refused and not left(folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("x")
        (tmp_path / "plain").chmod(0o600)
        as_umask_says(tmp_path / "plain")
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
        Datastore(np.zeros(3, dtype=np.int32), np.zeros(3, dtype=np.int32), 8).save(
            tmp_path / "store"
        )
    finally:
        os.umask(before)
    found = {
        path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()
    }
    assert len(found) == 4 and set(found.values()) == {mode}, found


def test_a_dequantised_model_is_readable_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(loading, "_convert", convert)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"x")
    before = os.umask(0o022)
    try:
        folder = loading._dequantised(tmp_path / "a.gguf")
    finally:
        os.umask(before)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644 and not left(folder)

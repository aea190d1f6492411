"""Every config of configs/loggers/ trains offline; the tracker has the figures and the recipe."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from configs.command_line.loading import CONFIGS
from train.cli import command

SECONDS = 60.0


@pytest.fixture
def in_folder(tmp_path, monkeypatch, tiny, recipe):
    """Trains two steps with a logger's config, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> None:
        flags = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
        outputs = ("--output", str(tmp_path / "run"), "--probe.prompts", "0")
        configs = ("--config", str(recipe), "--config", f"loggers/{name}.yaml")
        assert command([*configs, *flags, *outputs]) == 0

    return run


def files(folder: Path, pattern: str) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob(pattern) if path.is_file())


def test_there_is_a_test_for_each() -> None:
    names = {path.stem for path in (CONFIGS / "loggers").glob("*.yaml")}
    assert names == {"wandb", "mlflow", "trackio"}


def test_wandb(in_folder, tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    in_folder("wandb")
    import wandb

    wandb.finish()
    expected = (b"val/loss", b"train/loss", b"modules.drafters.heads.medusa.Medusa")
    # The file is written by another process.
    end = time.monotonic() + SECONDS
    stored = b""
    while time.monotonic() < end and not all(word in stored for word in expected):
        time.sleep(0.2)
        stored = files(tmp_path / "runs" / "wandb", "*.wandb")
    assert [word for word in expected if word not in stored] == []


def test_mlflow(in_folder, tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    in_folder("mlflow")
    (run,) = (tmp_path / "runs" / "mlflow").glob("*/*/metrics")
    assert len((run / "train" / "loss").read_text().splitlines()) == 2
    assert (run / "val" / "loss").is_file()
    assert "Medusa" in (run.parent / "params" / "drafter" / "class_path").read_text()


def test_trackio(in_folder, tmp_path, monkeypatch) -> None:
    trackio = pytest.importorskip("trackio")
    for module in ("utils", "sqlite_storage"):
        monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", tmp_path / "trackio")
    in_folder("trackio")
    (run,) = trackio.Api().runs("slipstream")
    assert "Medusa" in str(run.config)
    logged = trackio.sqlite_storage.SQLiteStorage.get_logs("slipstream", run.name)
    assert [row["step"] for row in logged if "train/loss" in row] == [1, 2]
    assert any("val/loss" in row for row in logged)

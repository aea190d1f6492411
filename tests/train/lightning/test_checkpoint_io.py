"""Checkpoint files: whole or as they were, and never by way of another folder."""

from __future__ import annotations

import pytest
import torch

from data.datamodule import ConversationData
from modules.drafters.heads.medusa import Medusa
from train.lightning.checkpoint_io import SiblingCheckpointIO
from train.run import Recipe, lightning_trainer
from train.settings import TrainerSettings


class Unpicklable:
    """Fails in the middle of being written."""

    def __reduce__(self):
        raise OSError("no space left")


def test_a_checkpoint_is_renamed_within_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    place = tmp_path / "run" / "last.ckpt"
    SiblingCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(2)}}, place)
    assert torch.equal(
        SiblingCheckpointIO().load_checkpoint(place)["state_dict"]["a"], torch.ones(2)
    )
    assert [path.name for path in place.parent.iterdir()] == ["last.ckpt"]


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path):
    place, kept = tmp_path / "last.ckpt", {"step": 1}
    SiblingCheckpointIO().save_checkpoint(kept, place)
    with pytest.raises(OSError, match="no space"):
        SiblingCheckpointIO().save_checkpoint(
            {"big": torch.ones(1000), "step": Unpicklable()}, place
        )
    assert torch.load(place) == kept
    SiblingCheckpointIO().save_checkpoint({"step": 2}, place)
    assert torch.load(place) == {"step": 2} and [path.name for path in tmp_path.iterdir()] == [
        "last.ckpt"
    ]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "deepspeed_2"])
def test_every_strategy_saves_so(strategy, tmp_path):
    settings = TrainerSettings(accelerator="cpu", devices=1, strategy=strategy)
    recipe = Recipe(lambda shape: Medusa(shape, 1), ConversationData("embedded"), trainer=settings)
    assert isinstance(
        lightning_trainer(recipe, tmp_path).strategy.checkpoint_io, SiblingCheckpointIO
    )

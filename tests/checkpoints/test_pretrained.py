import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoints.pretrained as pretrained
from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained, warm_start
from modules.contracts.drafter import Drafter
from modules.contracts.losses import Losses
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import TrainedFor
from tests.fakes import tiny_target


class Tiny(Drafter):
    """A drafter of one matrix, used twice.

    More about it.
    """

    def __init__(self, shape: TargetShape, width: int = 4, names: list[str] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(shape.hidden_size, width)
        self.second = nn.Linear(shape.hidden_size, width)
        self.second.weight = self.first.weight
        self.register_buffer("ids", torch.arange(3))

    def loss(self, batch, target, progress):
        return Losses(self.first.weight.sum())

    def start(self, context):
        raise NotImplementedError


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture
def saved(target, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "trainable_class", lambda *_: Tiny)
    drafter = Tiny(target.shape, width=5, names=["a"])
    provenance = Provenance.of(target, measured={"probe/tau": 1.25}, data={"train": "embedded"})
    return drafter, save_pretrained(drafter, tmp_path / "run" / "drafter", provenance)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_saves_and_loads_the_same_weights_arguments_and_ties(saved, target):
    drafter, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "provenance.json"}
    for name in (folder, folder.parent):
        loaded = load_pretrained(name, target)
        assert loaded.arguments == drafter.arguments
        assert loaded.first.weight is loaded.second.weight
        for key, tensor in drafter.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key


def test_keeps_the_precision_it_was_saved_in(saved, target):
    drafter, folder = saved
    save_pretrained(drafter.double(), folder, Provenance.of(target))
    assert load_pretrained(folder).first.weight.dtype == torch.float64


def test_replaces_an_earlier_folder_whole(saved, target):
    drafter, folder = saved
    (folder / "stale.txt").write_text("")
    save_pretrained(drafter, folder, Provenance.of(target))
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["drafter"]


def test_shared_tensors_are_stored_once(saved):
    size = (saved[1] / "model.safetensors").stat().st_size
    assert size < 32 * 5 * 4 * 2


def test_card_and_provenance_say_what_was_measured_and_how(saved, target):
    card = (saved[1] / "README.md").read_text()
    assert "probe/tau | 1.2500" in card and target.fingerprint() in card
    assert "A drafter of one matrix, used twice." in card and "More about it" not in card
    found = json.loads((saved[1] / "provenance.json").read_text())
    trained_for = {"name": target.name, "fingerprint": target.fingerprint(), "dtype": "float64"}
    assert found["target"] == trained_for
    assert found["packages"]["torch"] == torch.__version__ and found["command"].startswith(
        "python "
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drafter_type": "os"}, "names 0 files under modules/"),
        ({"drafter_type": "../evil"}, "not names of a module"),
        (
            {"drafter_type": "trainable", "class": "Losses"},
            "not a trainable component of modules.contracts.trainable",
        ),
        ({"format_version": 99}, "format_version 99"),
    ],
)
def test_a_config_that_names_something_else_is_refused(saved, monkeypatch, changes, words):
    monkeypatch.undo()
    edit(saved[1], **changes)
    with pytest.raises(ValueError, match=words):
        load_pretrained(saved[1])


def test_tensors_that_do_not_fit_are_named_in_one_line(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    edit(saved[1], arguments={**config["arguments"], "width": 6})
    with pytest.raises(
        ValueError, match=r"reshaped: first.bias \(5,\) instead of \(6,\)"
    ) as caught:
        load_pretrained(saved[1])
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_file_is_said_so(saved):
    weights = saved[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_pretrained(saved[1])
    weights.unlink()
    with pytest.raises(ValueError, match="the component is incomplete"):
        load_pretrained(saved[1])


def test_another_target_is_refused_by_name(saved):
    with pytest.raises(ValueError, match="with weights .* the target tiny-llama has weights"):
        load_pretrained(saved[1], tiny_target(seed=1))
    with pytest.raises(ValueError, match="2 layers.*has hidden size 32 and 3 layers"):
        load_pretrained(saved[1], tiny_target(layers=3))


def test_a_component_says_itself_why_it_may_not_serve_a_target(saved, monkeypatch):
    with pytest.raises(ValueError, match="a vocabulary of 128 tokens.* has 96"):
        load_pretrained(saved[1], tiny_target(vocab=96))
    other, served = tiny_target(seed=1), []
    monkeypatch.setattr(Tiny, "serve", lambda self, target: served.append(target))
    monkeypatch.setattr(Tiny, "compatibility", lambda self, target: None)
    load_pretrained(saved[1], other)
    assert served == [other]
    monkeypatch.setattr(Tiny, "compatibility", lambda self, target: f"dislikes {target.name}")
    with pytest.raises(ValueError, match="drafter' dislikes tiny-llama"):
        load_pretrained(saved[1], other)
    assert load_pretrained(saved[1]).trained_for.name == "tiny-llama"


def test_names_that_hold_nothing_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no trained component"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not exist: give a run folder"):
        load_pretrained(tmp_path / "none")
    monkeypatch.setattr(
        pretrained, "_download", lambda name: pytest.fail(f"{name} was looked for on the Hub")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exports").mkdir()
    for name in ("runs/nothere", "exports/eagle3"):
        with pytest.raises(ValueError, match="does not exist: give a run folder"):
            load_pretrained(name)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder here nor a reachable Hub repository"):
        load_pretrained("nobody/nothing")


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(saved[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_pretrained("someone/clover@main")
    assert asked["repo"] == "someone/clover" and asked["revision"] == "main"


def test_warm_start_takes_weights_but_not_precision(saved, target):
    fresh = Tiny(target.shape, width=5).double()
    warm_start(fresh, saved[1])
    assert torch.equal(fresh.first.weight, saved[0].first.weight.double())


def test_warm_start_takes_what_a_base_class_has_and_refuses_a_stranger(saved, target, monkeypatch):
    class Larger(Tiny):
        """A tiny one and more."""

        def __init__(self, shape: TargetShape, width: int = 4) -> None:
            super().__init__(shape, width)
            self.extra = nn.Parameter(torch.ones(3))

    larger = Larger(target.shape, width=5)
    warm_start(larger, saved[1])
    assert torch.equal(larger.first.weight, saved[0].first.weight) and torch.equal(
        larger.extra, torch.ones(3)
    )
    monkeypatch.setattr(pretrained, "trainable_class", lambda *_: Larger)
    with pytest.raises(ValueError, match="is a Larger, the config trains a Tiny"):
        warm_start(Tiny(target.shape), saved[1])


def test_shapes_differing_only_in_positions_are_the_same_target(target):
    shorter = TrainedFor("t", replace(target.shape, max_positions=7), target.fingerprint())
    assert shorter.difference(target) is None


def test_arguments_of_another_version_are_refused(saved):
    edit(saved[1], arguments={"depth": 3})
    with pytest.raises(ValueError, match="does not fit Tiny: .*depth"):
        load_pretrained(saved[1])

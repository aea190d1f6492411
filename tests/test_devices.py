"""Every command runs its target on the GPU of its process, unless its own key names another
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import data.features
import data.regenerate
import eval.cli
import eval.divergences
import eval.generate
import eval.latency
import eval.rules
import train.cli
import train.learning_curve
import train.throughput
from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.drafters.heads.medusa import Medusa
from modules.target import loading
from modules.target.loading import load_target, own_device
from modules.target.target import Target
from tests.fakes import tiny_target

RECIPE = ["--config", "eagle3.yaml"]
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], object], list[str]]] = {
    "train": (train.cli.command, [*RECIPE, "--output", "run", "--data.features", "features"]),
    "train.profile": (train.cli.command, [*RECIPE, "--profile"]),
    "train.learning_curve": (
        train.learning_curve.command,
        [*RECIPE, "--sizes", "[100]", "--output", "curve"],
    ),
    "train.throughput": (train.throughput.command, []),
    "data.features": (data.features.command, [*RECIPE, "--data.features", "features"]),
    "data.regenerate": (
        data.regenerate.command,
        ["--prompts", "prompts.jsonl", "--output", "answers.jsonl"],
    ),
    "eval": (eval.cli.command, ["--output", "report", "--target", "smollm2-135m"]),
    "eval.generate": (
        eval.generate.command,
        ["--drafter", "none", "--prompt", "why?", "--target", "smollm2-135m"],
    ),
    "eval.divergences": (
        eval.divergences.command,
        [
            "--drafter",
            "none",
            "--prompts",
            "prompts.jsonl",
            "--output",
            "mined.jsonl",
            "--target",
            "smollm2-135m",
        ],
    ),
    "eval.rules": (eval.rules.command, []),
    "eval.latency": (eval.latency.command, []),
}


class Asked(BaseException):
    """Ends a command where it loads its target; says on which device."""


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that says it has eight GPUs, of whose processes this is the third."""

    def told(dtype: str, device: str | None = None) -> None:
        raise Asked(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("train.run.lightning_trainer", lambda *_, **__: None)
    monkeypatch.setattr("eval.divergences.find_folder", lambda name: Path(name))
    monkeypatch.setattr("eval.generate.chat_arguments", lambda *_: {})
    monkeypatch.setattr("eval.divergences.chat_arguments", lambda *_: {})
    monkeypatch.setattr(loading, "check_loading", told)
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "Why?"}\n')


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_asks_for_its_own_gpu_or_for_the_device_that_is_named(
    name: str, eight_gpus: None
) -> None:
    command, flags = COMMANDS[name]
    own, other = (
        (["--trainer.accelerator", "cpu"], "cpu")
        if "--sizes" in flags or "--profile" in flags or name == "train"
        else (["--device", "cuda:5"], "cuda:5")
    )
    for more, device in (([], "cuda:2"), (own, other)):
        with pytest.raises(Asked) as asked:
            command(
                [*flags, *more, *(["--overwrite"] if more and name in ("train", "eval") else [])]
            )
        assert asked.value.args == (device,)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"


def test_the_targets_gpu_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target, current = tiny_target(dtype=torch.float32), []
    target.stock.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    load_target(str(tmp_path), "float32", "cpu")
    assert not current
    monkeypatch.setattr(Target, "device", torch.device("cuda", 3))
    load_target(str(tmp_path), "float32", "cpu")
    assert current == [torch.device("cuda", 3)]


def test_a_loaded_drafter_stands_where_its_target_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tiny_target(dtype=torch.float32)
    save_pretrained(Medusa(target.shape, heads=2), tmp_path / "drafter", Provenance.of(target))
    monkeypatch.setattr(Target, "device", torch.device("meta"))
    found = load_pretrained(tmp_path / "drafter", target)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    assert {
        parameter.device.type for parameter in load_pretrained(tmp_path / "drafter").parameters()
    } == {"cpu"}

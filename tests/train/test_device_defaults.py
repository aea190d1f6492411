"""What `auto` and the default trees mean on a GPU and on a CPU; the GPU is a pretence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import modules.target.loading
from eval.evaluation import Evaluation
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.cost_model.budget import BUDGETS, budgets_on
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.heads.hydra import Hydra
from modules.drafters.heads.medusa import Medusa
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.drafters.trained import TrainedDrafter
from modules.target.loading import chosen_dtype, load_target
from modules.target.target import Target
from modules.trees.reranked import RerankedTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.families import built
from train import cli
from train.run import train
from train.settings import chosen_precision


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def settled(*flags: str) -> tuple[str, str]:
    config = cli.settled(cli.parse(cli.make_parser(), ["--config", "eagle3.yaml", *flags]))
    return config.dtype, config.trainer.precision


def test_auto_is_float32_on_a_cpu() -> None:
    assert settled() == ("float32", "32-true")
    assert chosen_precision("auto", "auto") == "32-true" and chosen_dtype("auto") == "float32"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("bfloat16", "bf16-mixed")),
        (["--dtype", "float32"], ("float32", "bf16-mixed")),
        (["--trainer.precision", "32-true"], ("bfloat16", "32-true")),
        (["--trainer.accelerator", "cpu"], ("float32", "32-true")),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_and_what_is_given_wins(
    gpu: None, flags: list[str], expected: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    assert settled(*flags) == expected
    device = "cpu" if "cpu" in flags else "cuda:0"
    told = f"target in {expected[0]}, training in {expected[1]}: chosen for {device}\n"
    assert capsys.readouterr().out == told


def test_an_old_gpu_keeps_float32(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert settled() == ("float32", "32-true")


def test_nothing_is_said_of_what_was_given(capsys: pytest.CaptureFixture) -> None:
    assert settled("--dtype", "float64", "--trainer.precision", "64-true") == ("float64", "64-true")
    assert not capsys.readouterr().out


def test_a_run_stores_what_auto_was(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored: dict[str, Any] = {}

    def train(recipe: Any, place: Any) -> None:
        stored.update(yaml.safe_load((place.output / "config.yaml").read_text()))
        pytest.fail(f"{recipe.dtype} {recipe.trainer.precision}")

    monkeypatch.setattr(cli, "train", train)
    with pytest.raises(pytest.fail.Exception, match="bfloat16 bf16-mixed"):
        cli.command(["--config", "eagle3.yaml", "--output", str(tmp_path / "run")])
    assert (stored["dtype"], stored["trainer"]["precision"]) == ("bfloat16", "bf16-mixed")


@pytest.mark.parametrize(("precision", "expected"), [("auto", ["high"]), ("32-true", [])])
def test_mixed_training_on_a_gpu_multiplies_in_tf32(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, expected: list[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr("train.run.lightning_trainer", lambda *_: sys.exit(7))
    parser = cli.make_parser()
    config = cli.parse(parser, ["--config", "eagle3.yaml", "--trainer.precision", precision])
    with pytest.raises(SystemExit):
        train(cli.recipe_of(parser, config), cli.Place(tmp_path))
    assert asked == expected


def test_a_target_is_loaded_as_auto_says(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also `eval.py`, whose engines are told the same name."""
    asked: list[torch.dtype] = []

    def from_pretrained(folder: str, dtype: torch.dtype, **_: object) -> None:
        asked.append(dtype)
        raise OSError("enough")

    monkeypatch.setattr(
        modules.target.loading,
        "AutoModelForCausalLM",
        SimpleNamespace(
            from_pretrained=from_pretrained, from_config=AutoModelForCausalLM.from_config
        ),
    )
    for device, dtype in (("cuda:0", torch.bfloat16), ("cpu", torch.float32)):
        with pytest.raises(ValueError, match="enough"):
            load_target("smollm2-135m", device=device)
        assert asked.pop() == dtype
    assert capsys.readouterr().err.count("bfloat16 on cuda:0 (dtype auto)") == 1
    for device, name in ((None, "bfloat16"), ("cpu", "float32")):
        assert Evaluation(device=device).dtype == name


# -- trees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "builder", "nodes"),
    [
        ("eagle3", RerankedTree, 60),
        ("fspad", RerankedTree, 60),
        ("medusa", StaticTree, 61),
        ("hydra", StaticTree, 61),
    ],
)
def test_a_gpu_drafts_wide_trees(
    name: str, builder: type, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target()
    drafter = built(name, target, shake=0.05)
    assert drafter.default_budget == 5 and not isinstance(drafter.builder, RerankedTree)
    plain = SpeculativeDecoder(target).decode([[7, 8, 9]], Sampling(), 12)[0]
    monkeypatch.setattr(TrainedDrafter, "on_gpu", True)
    assert isinstance(drafter.builder, builder) and drafter.default_budget == nodes
    trace = SpeculativeDecoder(target, drafter).decode([[7, 8, 9]], Sampling(), 12)[0]
    assert trace.ids == plain.ids
    assert max(trace.rows) == nodes + 1


SAME: dict[str, Callable[[TargetShape], TrainedDrafter]] = {
    "clover": Clover,
    "clover2": Clover2,
    "falcon": Falcon,
    "s2d": lambda shape: S2D(shape, exits=[2]),
    "s2d_wide": lambda shape: S2D(shape, exits=[2], width=2),
    "independent": Independent,
    "independent_wide": lambda shape: Independent(shape, draft_length=4, width=4),
    "medusa_narrow": lambda shape: Medusa(shape, tree="narrow"),
    "medusa_optimised": lambda shape: Medusa(shape, tree="optimised_9"),
    "hydra_narrow": lambda shape: Hydra(shape, tree="narrow"),
    "clover_narrow": lambda shape: Clover(shape, tree="narrow"),
    "clover2_eagle_25": lambda shape: Clover2(shape, tree="eagle_25"),
}
"""Drafters without a wide tree, and trees that were written out."""


@pytest.mark.parametrize("name", SAME)
def test_a_tree_is_the_same_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    drafter = SAME[name](target.shape)
    drafter.initialise(target)
    drafter = drafter.double().eval()
    before = drafter.builder, drafter.default_budget
    rows = decoded_rows(target, drafter)
    monkeypatch.setattr(TrainedDrafter, "on_gpu", True)
    assert (drafter.builder, drafter.default_budget) == before
    assert decoded_rows(target, drafter) == rows and max(rows) <= before[1] + 1


def decoded_rows(target: Target, drafter: TrainedDrafter) -> list[int]:
    """Rows of every verification, the chain of an adaptive drafter at its longest in the end."""
    trace = SpeculativeDecoder(target, drafter).decode([[7, 8, 9]], Sampling(), 40)[0]
    return list(trace.rows)


@pytest.mark.parametrize("kind", [Medusa, Hydra])
def test_the_wide_tree_fits_a_small_draft_vocabulary(
    kind: type[Medusa | Hydra], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target()
    drafter = kind(target.shape, draft_vocabulary=6)
    drafter.initialise(target)
    drafter = drafter.double().eval()
    plain = SpeculativeDecoder(target).decode([[7, 8, 9]], Sampling(), 12)[0]
    monkeypatch.setattr(TrainedDrafter, "on_gpu", True)
    trace = SpeculativeDecoder(target, drafter).decode([[7, 8, 9]], Sampling(), 12)[0]
    assert trace.ids == plain.ids and 6 < max(trace.rows) <= drafter.default_budget + 1
    with pytest.raises(ValueError, match="rank of 9, but the draft vocabulary has 6"):
        kind(target.shape, draft_vocabulary=6, tree=[[0], [9]])


def test_budget_auto_tries_wide_trees_on_a_gpu_alone() -> None:
    assert budgets_on(torch.device("cpu")) == BUDGETS and max(BUDGETS) == 23
    assert max(budgets_on(torch.device("cuda:0"))) == 63

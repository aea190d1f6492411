from functools import cache
from pathlib import Path
from typing import Any

import pytest

from configs.command_line.loading import CONFIGS, parse, recipes
from data.datamodule import ConversationData
from train.cli import command, make_parser

RECIPES, BUDGETS = recipes(), sorted((CONFIGS / "budget").glob("*.yaml"))
DRAFTERS = [path for path in RECIPES if path.parent.name == "drafters"]
TARGETS = sorted((CONFIGS / "targets").glob("qwen*.yaml"))
"""Those of the Hub; others are for one recipe."""
LARGE = ("large", "gpu_8b")
"""For targets of 7B and more, whose learning rate is another."""
PARSER = make_parser()


@cache
def alone(recipe: Path) -> Any:
    """The settings of a recipe without a budget or a target."""
    return parsed("--config", str(recipe))


def parsed(*flags: str) -> Any:
    return parse(PARSER, flags)


@pytest.mark.parametrize("budget", LARGE)
@pytest.mark.parametrize("recipe", ["eagle3", "medusa", "clover2"])
def test_budgets_for_large_targets_hold_published_values_and_can_be_planned(
    recipe, budget, capsys, monkeypatch
):
    """On a device of 80 GiB."""
    monkeypatch.setattr("train.plan.available", lambda _: 80 * 2.0**30)
    flags = [
        "--config",
        f"{recipe}.yaml",
        "--config",
        f"budget/{budget}.yaml",
        "--drafter.draft_vocabulary",
        "32000",
    ]
    config = parsed(*flags)
    assert (
        config.optimizer.lr == 5e-5
        and config.data.init_args.max_length == 2048
        and config.data.init_args.workers
    )
    assert (config.dtype, config.trainer.precision) == ("bfloat16", "bf16-mixed")
    assert command([*flags, "--plan"]) == 0
    assert "bf16-mixed, by arithmetic" in capsys.readouterr().out


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_budget_fits_every_recipe_and_leaves_the_method_alone(recipe, budget):
    before, merged = (
        alone(recipe),
        parsed("--config", str(recipe), "--config", str(budget)),
    )
    assert merged.drafter == before.drafter
    own = ("lr", "warmup_ratio") if budget.stem in LARGE else ()
    assert [
        name
        for name in vars(before.optimizer)
        if merged.optimizer[name] != before.optimizer[name] and name not in own
    ] == []
    assert merged.seed == 0 and merged.trainer.max_epochs > 0


def test_the_reference_budget_is_what_tables_are_measured_at():
    config = parsed("--config", "clover.yaml", "--config", "budget/reference.yaml")
    assert (config.data.init_args.max_response_tokens, config.trainer.max_epochs, config.seed) == (
        200000,
        2,
        0,
    )


def test_runs_share_a_feature_cache_by_target_and_states(tiny, conversations, tmp_path):
    data = ConversationData(
        train=str(conversations), max_length=128, features=str(tmp_path / "{target}-{states}")
    )
    data.bind(tiny, ("final", 1))
    assert [path.name for path in tmp_path.iterdir()] == [f"{tiny.fingerprint()}-final+1"]
    batch = next(iter(data.train_dataloader()))
    assert set(batch.states) == {"final", 1}


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", DRAFTERS, ids=lambda path: path.stem)
def test_every_target_fits_every_recipe_of_a_drafter_and_leaves_the_method_alone(recipe, target):
    """LUD, which drafts with the target's own head, has no draft vocabulary and is told so."""
    flags = ["--config", str(recipe), "--config", str(target)]
    plain = alone(recipe)
    if recipe.stem == "lud":
        with pytest.raises(ValueError, match="the key 'drafter.draft_vocabulary' is unknown"):
            parsed(*flags)
        return
    merged = parsed(*flags)
    arguments = merged.drafter.init_args.as_dict()
    assert arguments.pop("draft_vocabulary") > 8192
    assert merged.target != plain.target and merged.dtype == "bfloat16"
    before = plain.drafter.init_args.as_dict()
    assert arguments == {name: before[name] for name in arguments}
    assert merged.optimizer == plain.optimizer

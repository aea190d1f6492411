import pytest

from data.configfiles import CONFIGS
from data.datamodule import ConversationData
from train.cli import make_parser

RECIPES, BUDGETS = (sorted(folder.glob("*.yaml")) for folder in (CONFIGS, CONFIGS / "budget"))


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_budget_fits_every_recipe_and_leaves_the_method_alone(recipe, budget):
    alone = make_parser().parse_args(["--config", str(recipe)])
    merged = make_parser().parse_args(["--config", str(recipe), "--config", str(budget)])
    assert merged.drafter == alone.drafter and merged.optimizer == alone.optimizer
    assert merged.seed == 0 and merged.trainer.max_epochs > 0


def test_the_reference_budget_is_what_tables_are_measured_at():
    config = make_parser().parse_args(["--config", str(CONFIGS / "clover.yaml"), "--config",
                                       str(CONFIGS / "budget" / "reference.yaml")])
    assert (config.data.init_args.max_response_tokens, config.trainer.max_epochs, config.seed) == (200000, 2, 0)


def test_runs_share_a_feature_cache_by_target_and_states(tiny, conversations, tmp_path):
    data = ConversationData(train=str(conversations), max_length=128, features=str(tmp_path / "{target}-{states}"))
    data.bind(tiny, ("final", 1))
    assert [path.name for path in tmp_path.iterdir()] == [f"{tiny.fingerprint()}-final+1"]
    batch = next(iter(data.train_dataloader()))
    assert set(batch.states) == {"final", 1}

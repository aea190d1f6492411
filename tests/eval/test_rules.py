"""The comparison of rules: the chances it adds up are those of tossing, and a perfect drafter is
accepted whole.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.methods.rows import Method
from eval.metrics.bootstrap import mean_interval
from eval.rule_comparison.contexts import Spot, calibrate, measure, spots
from eval.rule_comparison.tables import fastest_shape, tables, verdict
from eval.rule_comparison.trials import ORDERS, Trial, level_trials, tree_trials
from eval.rules import Comparison, command, models
from modules.acceptance.rules import Draws, PointRule, RatioRule
from modules.cost_model.latency_table import LatencyTable
from modules.drafters.small_models.s2d import S2D
from modules.target.target import Target
from modules.trees.sampled.branching import branching_tree
from modules.trees.static import StaticTree
from tests.fakes import tiny_target, tiny_tokenizer

ASKED = Comparison(limit=2, contexts=2, max_new_tokens=6, draws=2)
GRID = ASKED.grid
SMALL = "modules.drafters.small_models.independent.Independent"
PROMPTS = [[7, 8, 9], [20, 21]]


def drafted_by(target: Target, layers: int) -> S2D:
    drafter = S2D(target.shape, [layers], adaptive=False)
    drafter.initialise(target)
    return drafter.double().eval()


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(vocab=40, layers=3)


def test_more_layers_than_the_target_has_are_named(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.rules.check_room", lambda *_: None)
    monkeypatch.setattr("eval.rules.load_target", lambda *_: target)
    with pytest.raises(ValueError, match=r"layers 99 is more than the target's \d+: lower it"):
        models(Comparison(layers=99))


def test_the_target_as_its_own_drafter_is_accepted_whole(target: Target) -> None:
    trials = tree_trials([0.7, 0.2])
    values, firsts = measure(spots(target, drafted_by(target, 3), PROMPTS, GRID), trials, GRID)
    assert (
        min(accepted for accepted, _ in firsts) > 1 - 1e-5 > max(believed for _, believed in firsts)
    )
    for name in (
        "chain of 3, ratio",
        "5 chains of 3, multi_round",
        "5 chains of 3, k_seq",
        "RSD-C 3-2-1",
        "3-2-1 independent, multi_round",
    ):
        assert values[name] == pytest.approx([3.0, 3.0], abs=1e-4), name
    assert all(len(values[name]) == 2 and max(values[name]) <= 6 for name in trials)


def test_a_plain_model_drafts_as_it_is(tmp_path: Path) -> None:
    tiny_target(vocab=128).stock.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    small = {"class_path": SMALL, "init_args": {"model": str(tmp_path)}}
    wanted = Comparison(target=str(tmp_path), drafter=small, dtype="float64")
    target, drafter, name = models(wanted)
    assert name == "independent" and target.dtype == torch.float64
    _, firsts = measure(spots(target, drafter, PROMPTS, GRID), tree_trials([0.7, 0.2]), GRID)
    assert min(accepted for accepted, _ in firsts) > 1 - 1e-4


def one_spot(target: Target) -> Spot:
    return next(
        spot for _, spot in spots(target, drafted_by(target, 1), PROMPTS, replace(GRID, draws=200))
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "5 chains of 3, multi_round",
        "5 chains of 3, k_seq",
        "RSD-S 5 wide, 3 deep",
        "DySpec",
        "Sequoia's shape, top-k by value",
    ],
)
def test_chances_are_what_tossing_gives(target: Target, name: str) -> None:
    """The same trees, judged once by the rule itself: the mean difference is noise around 0."""
    trial, spot = tree_trials([0.4, 0.2, 0.1])[name], one_spot(target)
    expected = np.array([sum(each) - 1 for each in spot.chances(trial, 200)])
    generators = tuple(torch.Generator().manual_seed(spot.seed + i) for i in range(200))
    state = spot.state.select(torch.zeros(200, dtype=torch.long))
    state.context = replace(state.context, generators=generators)
    tree = trial.builder.build(spot.drafter, state, trial.nodes)
    tossed = Draws(spot.sampling, [torch.Generator().manual_seed(10_000 + i) for i in range(200)])
    accepted = trial.rule(tree, spot.session.verify(tree), tossed)
    difference = (accepted.lengths_B.numpy() - 1) - expected
    assert abs(difference.mean()) <= 4 * difference.std() / np.sqrt(200) + 1e-12


def test_one_level_agrees_with_the_recorded_distributions(target: Target) -> None:
    spot = one_spot(target)
    trials = level_trials()
    single = [sum(each) - 1 for each in spot.chances(trials["ratio 1"], 400)]
    assert np.mean(single) == pytest.approx(spot.first_draw()[0], abs=5 * np.std(single) / 20)
    probs = Draws(spot.sampling, []).probs(spot.target_logits_V)
    best = spot.draft_logits_D.topk(3).indices
    assert sum(spot.chances(trials["point 3"], 1)[0]) - 1 == pytest.approx(float(probs[best].sum()))


def test_acceptance_by_sibling_is_a_share(target: Target) -> None:
    found, level_seconds = calibrate(spots(target, drafted_by(target, 2), PROMPTS, GRID), 20)
    assert len(found) == 8 and min(found) >= 0 and sum(found) <= 1 and 0 < level_seconds < 60


def test_sequoias_shape_follows_the_latency_table() -> None:
    """Free rows make it as large as may be, levels that cost shallow; where a row costs a call
    nothing is drafted.
    """
    acceptance = [0.6, 0.2, 0.1]
    free, dear = (LatencyTable(8, {1: 1.0, 16: 1.0 + 15 * per_row}) for per_row in (0.0, 1.0))
    large = fastest_shape(acceptance, free, 0.0)
    assert "`nodes: 15, depth: " in large and "call 1000.0 ms, of this tree 1000.0 ms" in large
    assert fastest_shape(acceptance, dear, 0.1).startswith("On this device no tree")
    depth, shallow = (
        int(re.findall(r"depth: (\d+)", text)[0])
        for text in (large, fastest_shape(acceptance, free, 0.3))
    )
    assert shallow < depth
    with pytest.raises(ValueError, match="latency table ends at 16 rows"):
        free.at(17)
    assert free.at(8) == 1.0 and dear.at(2.5) == pytest.approx(2.5)
    one = fastest_shape([0.5], LatencyTable(8, {1: 1.0, 2: 1.0}), 0.1)
    assert "`nodes: 1, depth: 1`: 1.50 tokens a call, 1.36x" in one


def test_tables_order_every_pair() -> None:
    names = {name for pair in ORDERS for name in pair}
    assert names <= {*level_trials(), *tree_trials([0.5, 0.2])}
    values = {name: [1.0, 2.0, 3.0] for name in names}
    better, worse = ORDERS[0]
    values[better] = [1.5, 2.5, 3.5]
    lines = tables(values)
    assert f"| {better} | {worse} | +0.5000 | +0.5000 to +0.5000 | holds |" in lines
    assert sum(line.endswith("| tie |") for line in lines) == len(ORDERS) - sum(
        better in pair for pair in ORDERS
    )
    assert [verdict(0.1, 0.2), verdict(-0.1, 0.2), verdict(-0.2, -0.1)] == [
        "holds",
        "tie",
        "reversed",
    ]
    assert tables({"DySpec": [1.0, 2.0], "Sequoia": [1.0, 3.0]})[-1].startswith(
        "| DySpec | Sequoia | -0.5000 |"
    )
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4


def test_wrong_pairings_and_settings_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match="rule 'ratio' cannot verify by_value trees"):
        Trial(StaticTree([(0,)]), RatioRule(), 1)
    with pytest.raises(ValueError, match="rule 'point' cannot verify without_replacement trees"):
        Trial(branching_tree([2]), PointRule(), 2)
    for wrong, message in (
        ({"draws": 0}, "draws must be at least 1"),
        ({"drafter": "nowhere"}, "methods: drafter: drafter 'nowhere' does not exist"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"prompts": "nowhere.jsonl"}, "does not exist"),
        ({"draft_temperature": 0.0}, "above 0"),
        ({"only": ["luck"]}, "'luck' is no trial: use some of .*'chain of 3, ratio', "),
    ):
        with pytest.raises(ValueError, match=message):
            Comparison(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draws"):
        command(["--draws", "0"])


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("eval.rules.compare", lambda _: pytest.fail("it was compared"))
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        command(["--output", str(tmp_path)])
    with pytest.raises(ValueError, match="cannot be written .No such file or directory"):
        command(["--output", str(tmp_path / "none" / "rules.md")])
    # A result is appended to what is there.
    monkeypatch.setattr("eval.rules.compare", lambda _: "## Temperature 1\n")
    for _ in range(2):
        assert command(["--output", str(tmp_path / "rules.md")]) == 0
    assert (tmp_path / "rules.md").read_text() == "## Temperature 1\n\n" * 2


def test_methods_refuse_wrong_pairings_before_anything_is_loaded(tmp_path: Path) -> None:
    static = {"class_path": "modules.trees.static.StaticTree", "init_args": {"paths": [[0]]}}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="rule 'ratio' cannot verify by_value trees"):
        Method(drafter=str(tmp_path), builder=static, rule="ratio").check()
    with pytest.raises(ValueError, match="rule 'per_row' is refused, it is not lossless"):
        Method(drafter=str(tmp_path), rule="per_row").check()
    Method(drafter=str(tmp_path), builder=static, rule="point").check()


def test_at_temperature_0_all_rules_match_the_targets_choice(target: Target) -> None:
    grid = replace(GRID, temperature=0.0)
    trials = {**level_trials(), **tree_trials([0.4, 0.2])}
    _, spot = next(spots(target, drafted_by(target, 1), PROMPTS, grid))
    choice = int(spot.target_logits_V.argmax())
    assert sum(spot.chances(trials["ratio 1"], 1)[0]) - 1 == float(
        choice == int(spot.draft_logits_D.argmax())
    )
    for name in ("k_seq 4", "multi_round 4", "recursive 4", "DySpec", "5 chains of 3, k_seq"):
        for chances in spot.chances(trials[name], 2):
            assert set(chances) <= {0.0, 1.0}

"""The tree size that is worth most, and the stored times it is judged by."""

from __future__ import annotations

import pytest

from eval.evaluation import Evaluation, keep_budgets
from eval.methods.rows import Method, build_rows
from eval.methods.variants import vary
from eval.run.journal import journaled_budgets
from modules.contracts.sampling import Sampling
from modules.cost_model.budget import BUDGETS, BudgetTrial, best_budget, try_budgets
from modules.cost_model.latency_table import LatencyTable, stored_latency
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.lookahead import Lookahead
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.drafters.retrieval.token_recycling import UNKNOWN, TokenRecycling
from tests.fakes import ScriptedDrafter, tiny_target


class Obedient(ScriptedDrafter):
    """A chain as long as the budget says."""

    def propose(self, state, budget):
        self.depth = budget
        return super().propose(state, budget)


def test_a_perfect_drafter_wants_its_depth_where_rows_are_free_and_nothing_where_not():
    target = tiny_target()
    decoder = SpeculativeDecoder(target, Obedient(target.shape, right=1.0, depth=3))
    for per_row, expected in ((0.0, 3), (10.0, 0)):
        table = LatencyTable(8, {rows: 1.0 + per_row * (rows - 1) for rows in (1, 2, 3, 4)})
        trials = try_budgets(decoder, table, [[7, 8, 9]], Sampling(), 24, budgets=(1, 2, 3))
        assert [trial.budget for trial in trials] == [1, 2, 3]
        assert trials[0].tokens_per_call < trials[1].tokens_per_call < trials[2].tokens_per_call
        assert best_budget(trials) == expected


def test_sizes_beyond_the_peak_are_not_tried():
    target = tiny_target()
    decoder = SpeculativeDecoder(target, Obedient(target.shape, right=1.0, depth=3))
    table = LatencyTable(8, {1: 1.0, 2: 1.01, 3: 9.0, 24: 99.0})
    trials = try_budgets(decoder, table, [[7, 8, 9]], Sampling(), 24)
    assert [trial.budget for trial in trials] == [1, 2, 3] and best_budget(trials) == 1


def test_equals_go_to_the_smaller_tree():
    assert best_budget([BudgetTrial(3, 1.5, 0.0, 1.2), BudgetTrial(5, 1.6, 0.0, 1.2)]) == 3


def test_nothing_is_drafted_where_no_tree_promises_more_than_plain_decoding(monkeypatch):
    assert best_budget([BudgetTrial(1, 1.1, 0.0, 0.97), BudgetTrial(3, 1.4, 0.0, 1.0)]) == 0
    target = tiny_target()
    drafter = Obedient(target.shape)
    plain = SpeculativeDecoder(target).decode([[7, 8, 9]], Sampling(), 12)[0]
    monkeypatch.setattr(drafter, "start", lambda context: pytest.fail("a state was made"))
    idle = SpeculativeDecoder(target, drafter, budget=0).decode([[7, 8, 9]], Sampling(), 12)[0]
    assert idle.ids == plain.ids and set(idle.rows) == {1} and not any(idle.drafted)


def test_times_are_measured_once_and_a_missing_width_measures_anew(tmp_path, monkeypatch):
    target = tiny_target()
    first = stored_latency(target, tmp_path, widths=(1, 2), repeats=1)
    assert len(list(tmp_path.iterdir())) == 1
    assert stored_latency(target, tmp_path, widths=(1, 2), repeats=1) == first
    assert set(stored_latency(target, tmp_path, widths=(1, 2, 3), repeats=1).seconds) == {1, 2, 3}


def test_an_evaluation_can_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    target = tiny_target()
    drafter = {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"}
    rows = build_rows([Method(name="lookup", drafter=drafter, budget="auto")], target, Sampling())
    assert rows[-1].budget in (0, *BUDGETS)


def test_prompts_decoded_together_are_tried_together(tmp_path, monkeypatch):
    target, batches = tiny_target(), []
    decode = SpeculativeDecoder.decode

    def watched(self, prompts, sampling, limit, observer=None):
        batches.append(len(prompts))
        return decode(self, prompts, sampling, limit, observer)

    monkeypatch.setattr(SpeculativeDecoder, "decode", watched)
    decoder = SpeculativeDecoder(target, Obedient(target.shape, right=1.0, depth=3))
    # Rows that are free for one sequence cost for three.
    prompts = [[7, 8, 9], [5, 6], [9], [4, 4]]
    table = LatencyTable(8, {1: 1.0, 2: 1.0})
    dear = LatencyTable(8, {1: 3.0, 2: 30.0})
    alone = try_budgets(decoder, table, prompts, Sampling(), 8, budgets=(1,))
    together = try_budgets(decoder, dear, prompts, Sampling(), 8, budgets=(1,), batch=3)
    assert batches == [1, 1, 1, 1, 3, 1] and (best_budget(alone), best_budget(together)) == (1, 0)
    assert together[0].tokens_per_call == pytest.approx(alone[0].tokens_per_call)
    # A table is of one batch size.
    tables = [stored_latency(target, tmp_path, (1, 2), 1, batch) for batch in (1, 3, 1)]
    assert len(list(tmp_path.iterdir())) == 2 and tables[0] is tables[2] is not tables[1]


def test_drafters_in_shorthand_draft_what_pays_at_each_temperature(monkeypatch):
    """A chain of the engine's own is not measured here."""
    measured = {(0.0, 1): 5, (1.0, 1): 2, (0.0, 4): 3, (1.0, 4): 0}
    for module in ("rows", "variants"):
        monkeypatch.setattr(
            f"eval.methods.{module}.automatic_budget",
            lambda decoder, sampling, batch: measured[sampling.temperature, batch],
        )
    assert Evaluation(drafters=["a"]).rows[0].budget == "auto"
    assert Evaluation(drafters=["a"], engine="vllm").rows[0].budget is None
    drafter = {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"}
    methods = [Method("a", drafter, budget="auto"), Method("b", drafter, budget=3)]
    rows = build_rows(methods, tiny_target(), Sampling())
    varied = vary(rows, [Sampling(), Sampling(1.0)], [1, 4])
    budgets = {row.name: (row.budget, row.decoder.nodes) for row in varied}
    assert budgets["a"] == (5, 5) and budgets["a, 4 at once"] == (3, 3)
    assert budgets["a at 1"] == (2, 2) and budgets["a at 1, 4 at once"] == (0, 0)
    assert budgets["b"] == budgets["b at 1"] == budgets["b, 4 at once"] == (3, 3)


def test_a_resumed_evaluation_keeps_the_budgets_that_it_measured(tmp_path, monkeypatch):
    """Times differ between runs, so that another size may promise most the second time."""
    monkeypatch.setattr("eval.methods.rows.automatic_budget", lambda *_: 5)
    drafter = {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"}
    methods = [Method("a", drafter, budget="auto"), Method("b", drafter, budget=3)]
    rows = build_rows(methods, tiny_target(), Sampling())
    journal = tmp_path / "journal.jsonl"
    assert journaled_budgets(journal) == {}
    journal.write_text('{"row": {"a": {"budget": 2}, "b": {"budget": 7}, "c": {"budget": 1}}}\n')
    keep_budgets(rows, journaled_budgets(journal))
    budgets = {row.name: (row.budget, row.decoder.nodes) for row in rows if row.budget}
    assert budgets == {"a": (2, 2), "b": (3, 3)}
    journal.write_text('{"row": {"a": {"bud')
    assert journaled_budgets(journal) == {}


def test_sizes_that_lookahead_cannot_fill_are_left_out():
    target = tiny_target()
    table = LatencyTable(8, {1: 1.0, 24: 1.0})
    decoder = SpeculativeDecoder(target, Lookahead(target.shape))
    trials = try_budgets(decoder, table, [[7, 8, 9, 7, 8]], Sampling(), 12)
    assert [trial.budget for trial in trials] == [15, 23]
    wide = SpeculativeDecoder(target, Lookahead(target.shape, window=12))
    with pytest.raises(
        ValueError, match="'auto' tries at most 23 nodes, lookahead needs 37: give its budget"
    ):
        try_budgets(wide, table, [[7, 8]], Sampling(), 12)


def test_a_trial_pays_for_the_rows_that_its_calls_compute():
    """Lookup that finds nothing sends one row, whatever its budget."""
    target = tiny_target()
    table = LatencyTable(8, {1: 1.0, 4: 100.0})
    decoder = SpeculativeDecoder(target, PromptLookup(target.shape, shortest=3))
    (trial,) = try_budgets(decoder, table, [[7, 8, 9]], Sampling(), 3, budgets=[3])
    assert trial.tokens_per_call == 1.0 and trial.predicted_speedup == pytest.approx(1.0, abs=0.1)


def test_trials_of_a_drafter_that_learns_begin_alike_and_leave_it_as_it_was():
    target = tiny_target()
    drafter = TokenRecycling(target.shape, tokens=20)
    table = LatencyTable(8, {1: 1.0, 24: 1.0})
    trials = try_budgets(
        SpeculativeDecoder(target, drafter), table, [[20, 30]], Sampling(), 40, budgets=(7, 7)
    )
    assert trials[0].tokens_per_call == trials[1].tokens_per_call > 1
    assert bool((drafter.successors_VK == UNKNOWN).all())


def test_a_budget_below_one_is_refused():
    drafter = {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"}
    with pytest.raises(ValueError, match="drafts nothing"):
        Method(drafter=drafter, budget=0).check()

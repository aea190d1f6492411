"""The exact policy finds everything, others what they choose; answers are the target's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.analysis import selection_recall
from eval.analysis.selection_recall import Figures, begin, command, measure, specs_at, table
from modules.sparse_kv.act_qkv import ActQKV, ActSelection
from modules.sparse_kv.exact import ExactTopK
from modules.sparse_kv.full import Full
from modules.sparse_kv.sentence_kv import SentenceKV
from modules.sparse_kv.session import SparseSession
from modules.sparse_kv.tidal import TidalDecode
from modules.sparse_kv.token_select import TokenSelect
from modules.sparse_kv.window import Window
from tests.fakes import tiny_target

PROMPT = [3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12, 5, 7, 31, 9, 14]


def test_figures_of_one_token() -> None:
    figures = Figures()
    weights = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    figures.add(weights, torch.tensor([[True, True, False, False]]))
    assert figures.recall == [0.5] and figures.share == [0.5]
    assert figures.mass == pytest.approx([0.6])


def test_policies_by_layer() -> None:
    target = tiny_target()
    policies = {
        "full": Full(),
        "exact": ExactTopK(4, "key_value"),
        "alone": ExactTopK(4, "query"),
        "window": Window(window=3, sinks=1),
        "tidal": TidalDecode(4, first=0, again=[]),
        "token_select": TokenSelect(budget=2, initial=1, local=2, chunk=4),
        "sentence_kv": SentenceKV(budget=8, start_tokens=1, recent=2, observed=2),
        "act_qkv": ActQKV(blocks=1, block=2, initial=1, local=2, window=4),
    }
    found = measure(target, policies, [PROMPT], 3)
    layers = target.shape.num_layers
    assert layers > 1 and {len(rows) for rows in found.values()} == {layers}
    for layer in range(layers):
        full = found["full"][layer]
        assert full.recall == full.share == [1.0] * len(full.recall)
        assert full.mass == pytest.approx([1.0] * len(full.mass))
        # A row's own slot is read too, wherever it stands.
        assert min(found["exact"][layer].recall) >= 4 / 5
        assert min(found["alone"][layer].recall) >= 4 / 5
        # Tokens 17, 18 and 19: three newest, one first, of 17 slots and more.
        share = [4 / 17, 4 / 18, 4 / 19]
        heads = target.shape.num_kv_heads
        assert found["window"][layer].share == pytest.approx(
            [value for value in share for _ in range(heads)]
        )
        assert sum(found["window"][layer].mass) < sum(found["exact"][layer].mass)
    # TidalDecode reads all in its first layer, and then keeps what it chose there.
    assert found["tidal"][0].share[0] == 1.0 and found["tidal"][1].share[0] < 0.5
    assert "| exact |" in table(found) and table(found).count("\n") == len(policies) + 1


def test_the_answer_is_plain_decoding_s(monkeypatch: pytest.MonkeyPatch) -> None:
    target, said = tiny_target(), []
    verify = type(target.open(1, 4)).verify

    def noted(session: object, tree: object, *others: object) -> object:
        said.append(int(tree.tokens_BN[0, 0]))  # type: ignore[attr-defined]
        return verify(session, tree, *others)  # type: ignore[arg-type]

    from modules.contracts.sampling import Sampling
    from modules.decoding.decoder import SpeculativeDecoder

    plain = SpeculativeDecoder(target).decode([PROMPT], Sampling(), 4)[0].ids
    monkeypatch.setattr(type(target.open(1, 4)), "verify", noted)
    policies = {
        "sentence_kv": SentenceKV(budget=8, start_tokens=1, recent=2, observed=2),
        "window": Window(window=3, sinks=1),
    }
    measure(target, policies, [PROMPT], 4)
    assert said == plain


def test_act_qkv_knows_the_densities_of_a_prompt_that_was_read_without_it() -> None:
    """The same as after a sparse reading that recalls every block; none of them is 0."""
    target, ids = tiny_target(), torch.tensor([PROMPT])
    lengths = torch.tensor([len(PROMPT)])
    policy = ActQKV(blocks=9, block=2, initial=1, local=2, window=4)
    session = target.open(1, 20)
    session.prefill(ids, lengths)
    selection = policy.start(target, 1)
    begin(session, selection, policy, ids)
    sparse = SparseSession(target, target.open(1, 20).cache, policy)
    sparse.prefill(ids, lengths)
    expected = sparse.reader.selection
    assert isinstance(expected, ActSelection) and bool((expected.densities_BL > 0).all())
    torch.testing.assert_close(selection.densities_BL, expected.densities_BL)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"exact", "window", "tidal", "token_select", "sentence_kv", "act_qkv"}
    assert set(specs_at(256)) == names
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        command(["--tokens", "0"])
    with pytest.raises(ValueError, match="lengths must be at least 1, got -4"):
        command(["--lengths", "[256, -4]"])
    with pytest.raises(ValueError, match="budgets: sentence_kv of 64: budget must be at least 65"):
        command(["--budgets", "[256, 64]"])
    monkeypatch.setattr(selection_recall, "load_target", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="noodle"):
        command(["--kind", "noodle"])
    with pytest.raises(ValueError, match="cannot be written .No such file or directory"):
        command(["--output", str(tmp_path / "none" / "table.md")])
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        command(["--output", str(tmp_path)])


def test_an_earlier_table_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_recall, "load_target", lambda *_: pytest.fail("it was loaded"))
    output = tmp_path / "table.md"
    output.write_text("an earlier table")
    with pytest.raises(ValueError, match="exists already: delete it or give another"):
        command(["--output", str(output)])
    assert output.read_text() == "an earlier table"
    assert list(tmp_path.iterdir()) == [output]


def test_a_length_beyond_the_context_is_refused_before_any_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tiny_target()
    monkeypatch.setattr(selection_recall, "load_target", lambda *_: target)
    monkeypatch.setattr(selection_recall, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(
        selection_recall, "prompt_ids", lambda turns, _: [5] * (len(turns[0]["content"]) // 4)
    )
    with pytest.raises(ValueError, match=r"lengths: 900000 gives .* context holds .*: lower it"):
        command(["--lengths", "[64, 900000]"])

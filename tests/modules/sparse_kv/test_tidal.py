"""TidalDecode: which layers choose, and what the others read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.drafters.self_speculative.sparse_kv.decoding import SparseDecoder
from modules.sparse_kv.exact import ExactTopK
from modules.sparse_kv.policy import LayerCall
from modules.sparse_kv.tidal import TidalDecode, TidalSelection, reselection_scores
from tests.fakes import tiny_target
from tests.modules.sparse_kv.checks import (
    Opened,
    check_batches,
    check_tree,
    check_whole,
    differs,
    prompts_of,
)

LAYERS = 6
POLICIES = [TidalDecode(8, 1, [3]), TidalDecode(8, 0, [], "query")]


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_target(layers=LAYERS)


@pytest.mark.parametrize("policy", POLICIES, ids=["again", "once"])
def test_rows_decode_as_alone(policy: TidalDecode, target: Any) -> None:
    check_tree(policy, target)
    check_batches(policy, target)
    assert differs(policy, target)


def test_full_attention_is_a_special_case(target: Any) -> None:
    """With the whole text as budget, or a selection in every layer."""
    check_whole(TidalDecode(44, 1, [3]), target)
    check_whole(TidalDecode(4, 0, [1, 2, 3, 4, 5]), target)


def test_layers_read_what_the_last_selection_layer_finds(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, Any] = {}
    exact: dict[int, Any] = {}
    choose = TidalSelection.choose
    top = ExactTopK(8, "key_value").start(target, 1)

    def watched(self: TidalSelection, call: LayerCall) -> Any:
        seen[call.layer] = choose(self, call)
        if call.layer in (1, 3):
            exact[call.layer] = top.choose(call)
        return seen[call.layer]

    monkeypatch.setattr(TidalSelection, "choose", watched)
    Opened(target, TidalDecode(8, 1, [3])).plain(prompts_of((40, 23)), [9])
    assert [seen[k] is None for k in range(LAYERS)] == [True, True, False, True, False, False]
    assert torch.equal(seen[2], exact[1]) and torch.equal(seen[4], exact[3])
    assert torch.equal(seen[5], exact[3]) and not torch.equal(exact[1], exact[3])


def test_bytes_are_those_of_full_and_of_sparse_layers(target: Any) -> None:
    slot = 2 * 2 * 8 * 8
    for again, whole in (([3], 3), ([], 2)):
        policy = TidalDecode(16, 1, again)
        trace = SparseDecoder(target, policy).decode(prompts_of((100,)), Sampling(), 6)[0]
        read = [slot * ((101 + i) * whole + 17 * (LAYERS - whole)) for i in range(5)]
        assert trace.kv_bytes == read


def test_a_reselection_layer_is_scored_as_it_decodes(target: Any) -> None:
    """One call for each layer gives what decoding token by token gives."""
    texts = [(prompts_of((40,))[0], [9, 20, 31]), (prompts_of((33,), 1)[0], [50, 60])]
    policy = TidalDecode(8, 1)
    scores = reselection_scores(target, texts, policy, [2, 4])
    for layer in (2, 4):
        right, said = 0, 0.0
        for prompt, answer in texts:
            opened = Opened(target, TidalDecode(8, 1, [layer]))
            text = [prompt[-1], *answer[:-1]]
            logits = opened.plain([prompt[:-1]], text)[0].float().log_softmax(-1)
            right += sum(int(row.argmax()) == token for row, token in zip(logits, answer))
            said += sum(float(row[token]) for row, token in zip(logits, answer))
        assert scores[layer] == pytest.approx((right / 5, said / 5), abs=1e-5)
    assert list(reselection_scores(target, texts[:1], policy)) == [2, 3, 4, 5]


def test_layers_out_of_order_are_refused(target: Any) -> None:
    with pytest.raises(ValueError, match="after the selection layer 2"):
        TidalDecode(again=[2])
    with pytest.raises(ValueError, match="layer 9 is none of the target's 6"):
        TidalDecode(again=[9]).start(target, 1)
    # Of 32 layers, the released default chooses anew in layer 13.
    deep = type("Deep", (), {"shape": type("Shape", (), {"num_layers": 32})})
    selection: Any = TidalDecode().start(deep(), 1)  # pyright: ignore[reportArgumentType]
    assert selection.again == {13}

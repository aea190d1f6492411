"""Compiled calls decode the same tokens, a graph serves all steps of its width, what has none runs
as before.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.target.kernels import compiled_calls as compiled
from modules.target.kernels.compiled_calls import WIDTHS, CompiledCalls, widened
from modules.target.target import Target
from tests import fakes
from tests.fakes import ScriptedDrafter, many_prompts, tiny_target

PROMPTS = many_prompts(4)
GREEDY, ENDLESS = Sampling(), frozenset({-1})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the graphs that are made, which then run uncompiled."""
    counts: Counter[str] = Counter()

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        counts["graphs"] += 1
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    return counts


def compiling(**kind: Any) -> Target:
    """A tiny target with compiled calls."""
    target = tiny_target(**kind)
    target.compile_calls()
    return target


def ids(decoder: SpeculativeDecoder, limit: int = 14) -> list[list[int]]:
    """Every prompt's answer, one prompt at a time."""
    return [decoder.decode([prompt], GREEDY, limit)[0].ids for prompt in PROMPTS]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3", "mistral", "opt"])
def test_tokens_are_those_of_plain_decoding_and_every_width_is_compiled_once(
    arch: str, made: Counter[str]
) -> None:
    expected, target = (
        ids(SpeculativeDecoder(tiny_target(arch), stop_ids=ENDLESS)),
        compiling(arch=arch),
    )
    assert ids(SpeculativeDecoder(target, stop_ids=ENDLESS)) == expected
    assert target.compiled is not None and list(target.compiled.graphs) == [(1, ("final",), 256)]
    assert made["graphs"] == 1
    drafter = ScriptedDrafter(target.shape, 0.6, decoys=2)
    assert ids(SpeculativeDecoder(target, drafter, stop_ids=ENDLESS)) == expected
    assert [width for width, _, _ in target.compiled.graphs] == [1, 12], "ten rows run as twelve"
    assert made["graphs"] == 2


def test_drafters_get_the_states_they_ask_for(made: Counter[str]) -> None:
    answers = []
    for target in (tiny_target(), compiling()):
        torch.manual_seed(0)
        drafter = Medusa(target.shape, heads=3).double().eval()
        drafter.initialise(target)
        traces = [
            SpeculativeDecoder(target, drafter).decode([prompt], GREEDY, 14)[0]
            for prompt in PROMPTS
        ]
        answers.append([(trace.ids, trace.accepted) for trace in traces])
    assert answers[0] == answers[1] and made["graphs"] >= 1


def test_every_state_and_the_logits_equal_those_of_an_uncompiled_call(made: Counter[str]) -> None:
    tree, found = TokenTree.chain(torch.tensor([[5, 6, 7]])), []
    for target in (tiny_target(), compiling()):
        session = target.open(1, 32)
        session.prefill(torch.tensor([[9, 8, 7, 6]]), torch.tensor([4]))
        found.append(session.verify(tree, (0, 1, "pre_norm")))
    torch.testing.assert_close(found[1].logits_BNV, found[0].logits_BNV)
    assert set(found[0].states) == set(found[1].states) == {0, 1, "pre_norm"}
    for name, state in found[0].states.items():
        torch.testing.assert_close(found[1].states[name], state)
    with pytest.raises(ValueError, match="state 7 is not one of"):
        session.verify(tree, (7,))


def test_batches_and_wide_trees_run_uncompiled(made: Counter[str]) -> None:
    target, plain = compiling(), SpeculativeDecoder(tiny_target(), stop_ids=ENDLESS)
    together = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.6), stop_ids=ENDLESS)
    assert [trace.ids for trace in together.decode(PROMPTS, GREEDY, 14)] == ids(plain)
    session = target.open(1, 128)
    session.prefill(torch.tensor([[9, 8, 7, 6]]), torch.tensor([4]))
    session.verify(TokenTree.chain(torch.randint(5, 99, (1, WIDTHS[-1] + 1))))
    assert not made and target.compiled is not None and not target.compiled.graphs


def test_contexts_of_many_sizes_share_few_graphs_each_compiled_for_one_shape(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fakes.DIMENSIONS, "max_position_embeddings", 4096)
    target = compiling(layers=1, dtype=torch.float32)
    drafter = ScriptedDrafter(target.shape, depth=0)
    decoder = SpeculativeDecoder(target, drafter, stop_ids=ENDLESS)
    sizes = range(200, 2500, 190)
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in sizes:
            decoder.decode([[7 + i % 50 for i in range(size)]], GREEDY, 3)
    assert len(sizes) > 10 and target.compiled is not None
    rooms = [capacity for _, _, capacity in target.compiled.graphs]
    assert rooms == [512, 1024, 2048, 4096] and made["graphs"] == len(rooms)


def test_two_answers_at_once_do_not_share_buffers_and_a_finished_one_leaves_its_own(
    made: Counter[str],
) -> None:
    target = compiling()
    decoder = SpeculativeDecoder(target, stop_ids=ENDLESS)
    expected = ids(decoder, 8)
    gc.collect()  # what the compiler's own frames hold
    streams = [decoder.stream(prompt, GREEDY, 8) for prompt in PROMPTS[:2]]
    told: list[list[int]] = [[], []]
    for _ in range(8):
        for text, stream in zip(told, streams, strict=True):
            text.append(next(stream)[0])
    assert told == expected[:2]
    del streams, stream
    gc.collect()
    assert target.compiled is not None and len(target.compiled._free[256]) == 2
    ids(decoder, 8)
    gc.collect()
    assert len(target.compiled._free[256]) == 2 and made["graphs"] == 1


def test_filling_rows_see_themselves_alone_and_stand_behind() -> None:
    rows = Rows(torch.tensor([[4, 5, 5]]), torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool())
    wide = widened(rows, 5)
    assert wide.position_ids_BN.tolist() == [[4, 5, 5, 0, 0]]
    assert torch.equal(wide.visible_BNJ[:, :3, :3], rows.visible_BNJ)
    assert wide.visible_BNJ[0, 3:].tolist() == [
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]
    assert not wide.visible_BNJ[0, :3, 3:].any() and widened(rows, 3) is rows


def test_each_device_is_compiled_in_its_own_way() -> None:
    target = tiny_target()
    calls = CompiledCalls(target, autotune=True)
    assert calls._how() == {"options": {"freezing": True, "max_autotune": True}}
    on_gpu = CompiledCalls(target)
    on_gpu.__class__ = type("OnGpu", (CompiledCalls,), {"target": property(lambda self: Stub)})
    assert on_gpu._how() == {"mode": "reduce-overhead"}


class Stub:
    """A target on a GPU, as far as the choice of graphs goes."""

    device = torch.device("cuda")


def test_what_cannot_be_compiled_whole_is_refused() -> None:
    target = tiny_target()
    model: Any = target.model
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(ValueError, match="compile: tiny-llama is 4bit: leave it out"):
        target.compile_calls()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_with_packed_weights_gives_the_same_logits_and_tokens() -> None:
    torch._dynamo.reset()
    target, plain = (
        compiling(layers=1, dtype=torch.float32),
        tiny_target(layers=1, dtype=torch.float32),
    )
    drafter = ScriptedDrafter(target.shape, 0.6, depth=2)
    expected = SpeculativeDecoder(plain, stop_ids=ENDLESS).decode([PROMPTS[0]], GREEDY, 9)[0].ids
    assert (
        SpeculativeDecoder(target, drafter, stop_ids=ENDLESS).decode([PROMPTS[0]], GREEDY, 9)[0].ids
        == expected
    )
    assert target.compiled is not None and [width for width, _, _ in target.compiled.graphs] == [3]
    tree, found = TokenTree.chain(torch.tensor([[5, 6, 7]])), []
    for each in (plain, target):
        session = each.open(1, 32)
        session.prefill(torch.tensor([[9, 8, 7, 6]]), torch.tensor([4]))
        found.append(session.verify(tree).logits_BNV)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)

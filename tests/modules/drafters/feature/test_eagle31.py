"""EAGLE-3.1: normalised fusion, normalised outputs, and attention within a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier
from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle3 import Eagle3
from modules.layers import window_cache
from modules.losses.chunked import training_rows
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import built, documents, filled

TARGET = tiny_target()
OFF: dict[str, Any] = {
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_output": False,
    "norm_before_residual": False,
    "qk_norm": False,
    "window": None,
}


def made(steps: int = 3, shake: float = 0.3, **options: Any) -> Eagle3:
    """A drafter with random gains."""
    torch.manual_seed(0)
    drafter = Eagle3(TARGET.shape, steps=steps, **options).double()
    drafter.initialise(TARGET)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=shake)
    return drafter.eval()


def steps_of(drafter: Eagle3, batch: TextBatch) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return list(drafter.unrolled(batch, TARGET, training_rows(batch, drafter.draft_steps)))


def test_with_all_flags_off_it_is_eagle_3() -> None:
    off, plain = made(**OFF), made()
    assert off.state_dict().keys() == plain.state_dict().keys()
    batch = filled(tiny_batch(TARGET), plain, TARGET)
    for one, other in zip(steps_of(off, batch), steps_of(plain, batch), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@torch.no_grad()
def test_one_norm_over_all_fused_states_or_one_for_each() -> None:
    size, eps = TARGET.shape.hidden_size, TARGET.shape.norm_eps

    def normed(states: Tensor, gain: Tensor) -> Tensor:
        return gain * states / (states.square().mean(-1, keepdim=True) + eps).sqrt()

    together, each = made(norm_before_fc=True), made(fc_norm=True)
    states = {k: (k + 1.0) * torch.randn(5, size).double() for k in together.fused_layers}
    joined = torch.cat(list(states.values()), -1)
    assert together.input_norm is not None and each.fc_norm is not None
    assert together.input_norm.weight.shape == (len(states) * size,)
    torch.testing.assert_close(
        together.read(states), normed(joined, together.input_norm.weight) @ together.fc.weight.T
    )
    parts = [normed(s, n.weight) for s, n in zip(states.values(), each.fc_norm, strict=True)]
    torch.testing.assert_close(each.read(states), torch.cat(parts, -1) @ each.fc.weight.T)


@torch.no_grad()
def test_normalised_outputs_keep_the_size_of_the_recurrent_feature() -> None:
    """With gains of 1 its root mean square is 1 at every step; without, it grows."""
    sizes = {}
    for norm_output in (True, False):
        drafter = made(8, 0.0, norm_output=norm_output)
        torch.manual_seed(1)
        for parameter in drafter.layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        drafter.norm.weight.fill_(1)
        batch = filled(documents([torch.randint(5, 120, (30,)).tolist()]), drafter, TARGET)
        carried = [part.square().mean(-1).sqrt() for _, part in steps_of(drafter, batch)]
        sizes[norm_output] = torch.stack([each.mean() for each in carried])
        if norm_output:
            torch.testing.assert_close(
                torch.stack(carried), torch.ones(8, len(carried[0])).double()
            )
    grown = sizes[False]
    assert bool((grown[1:] > grown[:-1]).all()) and grown[-1] > 1.5 * grown[0]


def test_the_next_step_reads_what_the_lm_head_reads_and_no_norm_is_added() -> None:
    batch = filled(tiny_batch(TARGET), made(), TARGET)
    for feature, carried in steps_of(made(norm_output=True), batch):
        assert torch.equal(feature, carried)
    assert made(norm_output=True).state_dict().keys() == made().state_dict().keys()


@torch.no_grad()
def test_rows_attend_to_the_window_before_them_and_to_drafted_rows() -> None:
    """Against the layer run over the rows that a step sees, written out one by one."""
    drafter = made(window=4)
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    rows = training_rows(batch, 3)
    steps, checked = steps_of(drafter, batch), 0
    features = drafter.read(batch.states).flatten(0, 1)
    flat_ids, places = batch.input_ids.flatten(), batch.position_ids.flatten()
    for m, t in enumerate(rows.flat_MK1[:, 0].tolist()):
        place = int(places[t])
        for step in range(3):
            if not rows.valid_MK[m, step]:
                break
            # 1. Text rows within the window of this step, then the drafted rows.
            first = max(0, place + step - 3)
            text = [t - place + p for p in range(first, place + 1)]
            read = [(int(flat_ids[s + 1]), features[s]) for s in text]
            read += [(int(flat_ids[t + 1 + j]), steps[j - 1][1][m]) for j in range(1, step + 1)]
            fused = [drafter.fuse(TARGET.embed(torch.tensor(i)), f) for i, f in read]
            inputs, residual = (torch.stack(part)[None] for part in zip(*fused, strict=True))
            positions = torch.arange(first, first + len(read))[None]
            visible = torch.ones(1, len(read), len(read), dtype=torch.bool).tril()
            out = drafter.layer(inputs, Rows(positions, visible), residual_BNH=residual)[0, -1]
            torch.testing.assert_close(steps[step][1][m], out)
            checked += place + step > 3
    assert checked > 12


def test_nothing_before_the_window_changes_a_draft() -> None:
    drafter = made(window=5)
    batch = filled(documents([list(range(20, 50))]), drafter, TARGET)
    rows = training_rows(batch, 3)
    changed = replace(batch, states={k: s.clone() for k, s in batch.states.items()})
    for state in changed.states.values():
        state[:, 10] += 1.0
    before, after = steps_of(drafter, batch), steps_of(drafter, changed)
    for step in range(3):
        reached = rows.flat_MK1[:, 0] - 10
        inside = (reached >= 0) & (reached + step < 5)
        same = (before[step][0] == after[step][0]).all(-1)
        # A later step also reads the outputs of earlier ones, which reached further back.
        assert not bool(same[inside].any())
        assert bool(same[(reached < 0) | (reached >= 5)].all())


@torch.no_grad()
def test_rebased_sinks_stand_right_before_the_window() -> None:
    """The layer over sinks and window alone, at positions without a gap."""
    drafter, plain = made(window=5, sinks=2, rebase=True), made(window=5, sinks=2)
    texts = [list(range(20, 50)), list(range(60, 85))]
    batch = filled(documents(texts), drafter, TARGET)
    rows, features = training_rows(batch, 3), drafter.read(batch.states).flatten(0, 1)
    rebased, unmoved = steps_of(drafter, batch), steps_of(plain, batch)
    flat_ids, places = batch.input_ids.flatten(), batch.position_ids.flatten()
    for m, t in enumerate(rows.flat_MK1[:, 0].tolist()):
        place = int(places[t])
        # Contexts that end within sinks and window have nothing to move.
        same = torch.allclose(rebased[0][1][m], unmoved[0][1][m], rtol=0, atol=1e-12)
        assert same == (place < 7)
        text = [t - place + p for p in range(place + 1) if p < 2 or p > place - 5]
        fused = [drafter.fuse(TARGET.embed(flat_ids[s + 1]), features[s]) for s in text]
        inputs, residual = (torch.stack(part)[None] for part in zip(*fused, strict=True))
        visible = torch.ones(1, len(text), len(text), dtype=torch.bool).tril()
        compact = Rows(torch.arange(len(text))[None], visible)
        out = drafter.layer(inputs, compact, residual_BNH=residual)[0, -1]
        # Rotations are computed in float32.
        torch.testing.assert_close(rebased[0][1][m], out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rebase", [False, True])
def test_a_window_with_sinks_drafts_as_it_was_trained(rebase: bool) -> None:
    """In training the first tokens of a document, in decoding the first slots; nothing between."""
    drafter = made(window=5, sinks=2, rebase=rebase)
    text = list(range(20, 50))
    batch = filled(documents([text]), drafter, TARGET)
    rows = training_rows(batch, 3)
    steps = steps_of(drafter, batch)
    trained = steps[0][0]
    for place, reached in ((1, True), (10, False)):
        changed = replace(batch, states={k: s.clone() for k, s in batch.states.items()})
        for state in changed.states.values():
            state[:, place] += 1.0
        after = steps_of(drafter, changed)[0][0]
        far = rows.flat_MK1[:, 0] >= place + 5
        assert bool((after != trained).any(-1)[far].all()) == reached
        assert bool((after == trained).all(-1)[far].all()) != reached
    # The state after a prompt is the first training step at its last token, read in parts too.
    for row, end in enumerate(rows.flat_MK1[:, 0].tolist()):
        ids = torch.tensor([text[: end + 1]])
        states = {name: state[:, : end + 1] for name, state in batch.states.items()}
        lengths, newest = torch.tensor([end + 1]), torch.tensor([text[end + 1]])
        state = drafter.start(Context(TARGET, ids, lengths, newest, states))
        torch.testing.assert_close(state.feature_BH[0], trained[row])
        # The next level, with the text's own token drafted, is the second training step.
        if rows.valid_MK[row, 1] and end + 2 < len(text):
            drafter.expand(state, Frontier(newest[:, None], torch.tensor([[-1]]), 0))
            token = torch.tensor([[text[end + 2]]])
            logits = drafter.expand(state, Frontier(token, torch.tensor([[0]]), 1))
            expected = drafter.head(1, TARGET)(steps[1][0][row])
            torch.testing.assert_close(logits[0, 0], expected)


@pytest.mark.parametrize("rebase", [False, True])
def test_slots_that_no_row_reaches_are_dropped(
    rebase: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are bounded in a long text, and its drafts are those of a cache that keeps all."""
    drafter = made(window=5, sinks=2, rebase=rebase)
    prompts = [torch.randint(5, 120, (count,)).tolist() for count in (40, 13)]
    logits: dict[int, list[Tensor]] = {}
    slots: dict[int, int] = {}
    expand = Eagle3.expand
    for block in (24, 1 << 12):
        monkeypatch.setattr(window_cache, "BLOCK", block)
        seen, slots[block] = logits.setdefault(block, []), 0

        def watched(
            self: Any, state: Any, frontier: Frontier, b: int = block, s: Any = seen
        ) -> Any:
            s.append(expand(self, state, frontier))
            slots[b] = max(slots[b], state.cache.keys_BGCD.shape[2])
            return s[-1]

        monkeypatch.setattr(Eagle3, "expand", watched)
        decoder = SpeculativeDecoder(
            TARGET, drafter, builder=StaticTree.chain(2), stop_ids=frozenset()
        )
        decoder.decode(prompts, Sampling(), 30)
    assert len(logits[24]) == len(logits[1 << 12]) > 30
    for one, other in zip(logits[24], logits[1 << 12], strict=True):
        torch.testing.assert_close(one, other)
    assert slots[24] <= 5 + 2 + 24 and slots[1 << 12] > 70


def test_a_window_as_long_as_the_text_is_none() -> None:
    batch = filled(tiny_batch(TARGET), made(), TARGET)
    for one, other in zip(steps_of(made(window=64), batch), steps_of(made(), batch), strict=True):
        assert torch.equal(one[0], other[0])


def test_a_layer_of_qwen3s_type_for_any_target(caplog: pytest.LogCaptureFixture) -> None:
    qwen, drafter = tiny_target("qwen3"), made(qk_norm=True)
    assert not caplog.records
    assert {"q_norm.weight", "k_norm.weight"} <= drafter.attention.state_dict().keys()
    plain = Eagle3(qwen.shape, qk_norm=False).double()
    plain.initialise(qwen)
    assert "q_norm.weight" not in plain.attention.state_dict()
    asked = Eagle3(qwen.shape)
    assert asked.layer.shape.qk_norm and built("eagle3", TARGET).attention.q_norm is not None


def test_mistakes_are_one_line() -> None:
    for options, words in (
        ({"fc_norm": True, "norm_before_fc": True}, "fc_norm and norm_before_fc are both true"),
        ({"window": 0}, "window must be at least 1, the row itself, or null"),
        ({"sinks": 2}, "sinks 2 without a window"),
        ({"window": 4, "rebase": True}, "rebase is true without sinks"),
    ):
        with pytest.raises(ValueError, match=words):
            Eagle3(TARGET.shape, **options)

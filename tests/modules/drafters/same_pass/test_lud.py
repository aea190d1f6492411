"""Lexical unit decoding: how units are marked, what placeholders see and learn, and the spans that
come of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modules.acceptance.relaxed import UnverifiedRule
from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier, proposal
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.same_pass.lud import LUD
from modules.drafters.same_pass.units import confident_tokens, unit_lengths
from modules.target.target import Target
from modules.trees.confident import ConfidentChain
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import ScriptedDrafter, many_prompts, tiny_batch, tiny_target
from tests.modules.conformance import check_decoding
from tests.modules.drafters.same_pass.test_units import lud, repeats
from tests.modules.families import documents
from tests.modules.sampling import goodness, small_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 10], [20, 21], [30, 31, 32, 33, 34], [12, 13, 14]]


# -- one pass over a text and its placeholders -----------------------------------------------------


@torch.no_grad()
def test_packed_placeholders_are_those_of_a_plain_text() -> None:
    """Logits equal those of the text up to the unit with placeholders after it, in the stock
    model."""
    drafter, batch = lud(outside=1.0), documents([list(range(40, 58)), list(range(70, 83))])
    twin = drafter.adapters.twin(TARGET)
    rows = drafter.rows(batch, TARGET)
    _, after = drafter.passed(batch, twin, rows)
    merged = drafter.adapt(TARGET)
    for m, flat in enumerate(rows.flat_MK1[:, 0].tolist()):
        b, t = divmod(flat, batch.input_ids.shape[1])
        text = TARGET.embed(batch.input_ids[b, : t + 1])
        inputs = torch.cat([text, drafter.placeholder_1H.expand(3, -1)])
        explicit = merged.stock(inputs_embeds=inputs[None]).logits[0, -3:]
        torch.testing.assert_close(drafter.head(0, twin)(after["final"][m]), explicit)


@torch.no_grad()
def test_tokens_do_not_see_placeholders() -> None:
    drafter, batch = lud(outside=1.0), tiny_batch(TARGET)
    twin = drafter.adapters.twin(TARGET)
    states, _ = drafter.passed(batch, twin, drafter.rows(batch, TARGET))
    alone = twin.features(batch, ("final",))["final"]
    torch.testing.assert_close(states["final"], alone)
    # In decoding: the logits of a call's nodes.
    chain = TokenTree.chain(torch.tensor([[20, 21, 22]]))
    for placed in ("last", "every"):
        drafter = lud(placed=placed, repeats=0)
        session = TARGET.open(1, 64)
        session.prefill(torch.tensor([[7, 8, 9]]), torch.tensor([3]))
        context = Context(TARGET, torch.tensor([[7, 8, 9]]), torch.tensor([3]), torch.tensor([20]))
        state = drafter.start(context)
        state = replace(state, available=type(state.available)([3]))
        tree = drafter.prepare(state, chain)
        assert tree.computed == {"last": 3 + 3, "every": 3 + 9}[placed]
        torch.testing.assert_close(
            session.verify(tree, ("final",)).logits_BNV, session.verify(chain).logits_BNV
        )


def test_the_loss_slowly() -> None:
    drafter = lud(outside=0.4, unit_confidence=0.05, parallel_weight=0.7)
    batch = documents([list(range(40, 58)), list(range(70, 83))], labels_from=4)
    rows = drafter.rows(batch, TARGET)
    merged = drafter.adapt(TARGET)
    text, parallel = [], []
    for ids, mask in zip(batch.input_ids, batch.document_ids == 0, strict=True):
        ids = ids[mask]
        text.append(F.cross_entropy(merged.stock(ids[None]).logits[0, 3:-1], ids[4:]))
    counts = [14, 9]
    for m, flat in enumerate(rows.flat_MK1[:, 0].tolist()):
        b, t = divmod(flat, batch.input_ids.shape[1])
        inputs = torch.cat(
            [TARGET.embed(batch.input_ids[b, : t + 1]), drafter.placeholder_1H.expand(3, -1)]
        )
        logits = merged.stock(inputs_embeds=inputs[None]).logits[0, -3:]
        parallel += [
            F.cross_entropy(logits[d], batch.input_ids[b, t + 2 + d])
            for d in range(3)
            if rows.valid_MK[m, d]
        ]
    whole = sum(part * n for part, n in zip(text, counts, strict=True)) / sum(counts)
    expected = whole + 0.7 * torch.stack(parallel).mean()
    losses = drafter.loss(batch, TARGET, 0.0)
    torch.testing.assert_close(losses.total, expected, check_dtype=False)
    assert int(losses.metrics["language_loss"].count) == sum(counts)


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("placed", ["last", "every"])
def test_verified_it_is_the_adapted_targets_own_text(placed) -> None:
    """With spans as long as they can be, most of which are wrong."""
    check_decoding(lambda target: lud(target, placed=placed, span_confidence=0.0, repeats=2))


@pytest.mark.parametrize("builder", [None, DrawnTree([(0,), (1,), (0, 0), (0, 1)], "independent")])
def test_verified_it_keeps_the_adapted_targets_distribution(builder) -> None:
    """Also with drawn trees, whose equal siblings are verified as drawn."""
    drafter = lud(small_target(), shake=0.3, span_confidence=0.0)
    served = drafter.adapt(small_target())
    decoder = SpeculativeDecoder(served, drafter, builder=builder, stop_ids=frozenset())
    assert goodness(decoder, [3, 1], Sampling(1.0), runs=1500) > 1e-4


def test_spans_of_one_are_plain_decoding_of_the_adapted_target() -> None:
    drafter = lud()
    served = drafter.adapt(TARGET)
    plain = [trace.ids for trace in SpeculativeDecoder(served).decode(PROMPTS, Sampling(), 12)]
    unsure = ConfidentChain(3, 1.1)
    for decoder in (
        SpeculativeDecoder(served, drafter, UnverifiedRule(), budget=0),
        SpeculativeDecoder(served, drafter, UnverifiedRule(), unsure),
    ):
        traces = decoder.decode(PROMPTS, Sampling(), 12)
        assert [trace.ids for trace in traces] == plain
        assert {count for trace in traces for count in trace.accepted} == {1}


def slow_spans(drafter: LUD, served: Target, prompt: list[int], beta: float, limit: int):
    """Unverified decoding as the summary describes it, every pass over the whole text."""
    text, ids, spans = list(prompt), [], []
    embed = served.embed
    with torch.no_grad():
        while len(ids) < limit:
            rows = embed(torch.tensor([text]))
            holders = drafter.placeholder_1H.expand(1, drafter.guesses, -1)
            # The first pass has no placeholders.
            inputs = torch.cat([rows, holders], 1) if ids else rows
            logits = served.stock(inputs_embeds=inputs).logits[0, len(text) - 1 :]
            span = [int(logits[0].argmax())]
            for row in logits[1:]:
                if float(row.softmax(-1).max()) < beta:
                    break
                span.append(int(row.argmax()))
            if repeats(text + span, len(span) - 1, drafter.repeats):
                span = span[:1]
            spans.append(len(span))
            text, ids = text + span, ids + span
    return ids[:limit], spans


@pytest.mark.parametrize("placed", ["last", "every"])
@pytest.mark.parametrize("beta, longest", [(0.0, 0), (0.0, 3), (0.3, 2)])
def test_unverified_it_is_the_papers_loop(placed, beta, longest) -> None:
    """Alone, and four ragged prompts at once."""
    drafter = lud(span_confidence=beta, repeats=longest, placed=placed, shake=0.1)
    served = drafter.adapt(TARGET)
    decoder = SpeculativeDecoder(served, drafter, UnverifiedRule(), stop_ids=frozenset())
    together = decoder.decode(PROMPTS, Sampling(), 20)
    for prompt, trace in zip(PROMPTS, together, strict=True):
        ids, spans = slow_spans(drafter, served, prompt, beta, 20)
        assert trace.ids == ids
        # A call emits the rest of one span and the beginning of the next.
        assert decoder.decode([prompt], Sampling(), 20)[0].ids == ids
        assert max(spans) > 1


@torch.no_grad()
def test_nothing_is_drafted_without_guesses() -> None:
    """After a rejected draft with placeholders at the end alone, and after a plain call."""
    drafter = lud(span_confidence=0.0, repeats=0)
    session = TARGET.open(2, 64)
    prompt, lengths = torch.tensor([[7, 8, 9], [5, 6, 7]]), torch.tensor([3, 3])
    session.prefill(prompt, lengths)
    state = drafter.start(Context(TARGET, prompt, lengths, torch.tensor([20, 21])))
    state = replace(state, available=type(state.available)([3, 3]))
    tree = drafter.prepare(state, TokenTree.chain(torch.tensor([[20, 30, 31], [21, 32, 33]])))
    verified = session.verify(tree, ("final",))
    accepted = Accepted(torch.tensor([[0, 1, 0], [0, 1, 2]]), torch.tensor([2, 3]), lengths)
    state = drafter.absorb(state, verified, accepted)
    assert list(state.available) == [0, 3]
    logits = drafter.expand(state, Frontier(lengths[:, None], -lengths[:, None], 0))
    assert not logits[0].any() and logits[1].any()
    tree = proposal(drafter, state, 3)
    assert tree.acceptable_BN.sum(1).tolist() == [1, 4]
    accepted = Accepted(torch.zeros(2, 1, dtype=torch.long), torch.tensor([1, 1]), lengths)
    state = drafter.absorb(state, replace(verified, tree=TokenTree.root(lengths)), accepted)
    assert proposal(drafter, state, 3).size == 1


@torch.no_grad()
def test_the_end_of_the_text_is_remembered() -> None:
    """Of prompts that are shorter too; the newest token is not yet a part of it."""
    drafter = lud(repeats=2)
    session = TARGET.open(2, 64)
    prompt, lengths = torch.tensor([[7, 8, 9], [5, 6, 0]]), torch.tensor([3, 2])
    session.prefill(prompt, lengths)
    state = drafter.start(Context(TARGET, prompt, lengths, torch.tensor([20, 21])))
    assert state.recent_BX.tolist() == [[-1, 7, 8, 9], [-2, -1, 5, 6]]
    verified = session.verify(TokenTree.chain(torch.tensor([[20, 30, 31], [21, 32, 33]])))
    accepted = Accepted(torch.tensor([[0, 1, 0], [0, 1, 2]]), torch.tensor([2, 3]), lengths)
    state = drafter.absorb(state, verified, accepted)
    assert state.recent_BX.tolist() == [[8, 9, 20, 30], [6, 21, 32, 33]]


def test_an_answer_ends_inside_a_unit() -> None:
    drafter = lud(span_confidence=0.0, repeats=0, shake=0.1)
    served = drafter.adapt(TARGET)
    open_end = SpeculativeDecoder(served, drafter, UnverifiedRule(), stop_ids=frozenset())
    ids = open_end.decode([PROMPTS[0]], Sampling(), 12)[0].ids
    for place in (3, 4, 5):
        stop = SpeculativeDecoder(
            served, drafter, UnverifiedRule(), stop_ids=frozenset({ids[place]})
        )
        found = stop.decode([PROMPTS[0]], Sampling(), 12)[0].ids
        assert found == ids[: ids.index(ids[place]) + 1]


def test_the_rule_accepts_what_is_wrong() -> None:
    """Also of a drafter that never drafts the target's token; a verified decoder accepts none."""
    wrong = ScriptedDrafter(TARGET.shape, right=0.0)
    lossy = SpeculativeDecoder(TARGET, wrong, UnverifiedRule(), stop_ids=frozenset())
    trace = lossy.decode([[7, 8, 9]], Sampling(), 17)[0]
    assert trace.accepted == [4] * 4 and not UnverifiedRule().lossless
    plain = SpeculativeDecoder(TARGET).decode([[7, 8, 9]], Sampling(), 17)[0].ids
    assert trace.ids != plain


def test_a_fixed_tree_is_verified_too() -> None:
    drafter = lud(placed="every")
    served = drafter.adapt(TARGET)
    plain = SpeculativeDecoder(served).decode(many_prompts(4), Sampling(), 9)
    tree = StaticTree([(0,), (1,), (0, 0), (0, 1)])
    drafted = SpeculativeDecoder(served, drafter, builder=tree).decode(
        many_prompts(4), Sampling(), 9
    )
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


# -- words of three tokens -------------------------------------------------------------------------

WORDS, BASE = 4, 5


def sentences(count: int, words: int, seed: int) -> TextBatch:
    """Rows of words that follow each other in a circle. The first token of each is one of two, at
    random; the other two are the word's own."""
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(WORDS, (count, 1), generator=generator)
    word = (begin + torch.arange(words)) % WORDS
    rare = (torch.rand(count, words, generator=generator) < 0.3).long()
    ids = BASE + 4 * word[..., None] + torch.stack([rare, 0 * rare + 2, 0 * rare + 3], dim=2)
    return documents(ids.flatten(1).tolist(), labels_from=1)


def fit(parameters, loss, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def speaker() -> Target:
    """A target that has learnt these words."""
    target = tiny_target(vocab=32, dtype=torch.float32)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.mul_(0.3 if parameter.dim() > 1 else 1.0)
    weights = [parameter.requires_grad_() for parameter in target.model.parameters()]

    def loss(step: int) -> Tensor:
        ids = sentences(8, 10, step).input_ids
        return F.cross_entropy(target.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    fit(weights, loss, 120, 1e-2)
    target.model.requires_grad_(False)
    return target


@pytest.fixture(scope="module")
def speaking(speaker: Target) -> LUD:
    drafter = lud(speaker, shake=0.0, rank=8, repeats=0).train()
    fit(
        drafter.parameters(),
        lambda step: drafter.loss(sentences(8, 10, 1000 + step), speaker, 0.0).total,
        120,
        1e-2,
    )
    return drafter.eval()


def test_words_are_units_and_come_in_one_pass(speaker: Target, speaking: LUD) -> None:
    """One pass a word instead of three with β = 0.9, and the text of plain decoding."""
    batch = sentences(4, 10, 5)
    lengths = unit_lengths(*confident_tokens(batch, speaker, 0.9), 4)
    assert set(lengths[:, 6::3].unique().tolist()) == {3}
    served = speaking.adapt(speaker)
    prompts = [batch.input_ids[b, : 5 + b].tolist() for b in range(3)]
    plain = [t.ids for t in SpeculativeDecoder(served).decode(prompts, Sampling(), 21)]
    spans = {}
    for beta in (0.0, 0.9, 1.1):
        builder = ConfidentChain(3, beta)
        decoder = SpeculativeDecoder(served, speaking, UnverifiedRule(), builder)
        traces = decoder.decode(prompts, Sampling(), 21)
        assert beta == 0 or [trace.ids for trace in traces] == plain
        # Without the first call, and the last, which the limit cuts.
        spans[beta] = [count for trace in traces for count in trace.accepted[1:-1]]
    assert set(spans[0.0]) == {4} and set(spans[1.1]) == {1}
    assert max(spans[0.9]) == 3 and sum(spans[0.9]) > 2.6 * len(spans[0.9])


@torch.no_grad()
def test_spans_shorten_as_their_threshold_rises(speaker: Target, speaking: LUD) -> None:
    """From the same state, to the drafted token."""
    served = speaking.adapt(speaker)
    prompt = sentences(1, 10, 6).input_ids[:, :9]
    session = served.open(1, 64)
    logits, states = session.prefill(prompt, torch.tensor([9]), ("final",))
    context = Context(served, prompt, torch.tensor([9]), logits.argmax(-1), states)
    state = speaking.start(context)
    verified = session.verify(speaking.prepare(state, TokenTree.root(state.newest_B)), ("final",))
    following = verified.logits_BNV[:, 0].argmax(-1)
    ones = torch.ones_like(following)
    state = speaking.absorb(state, verified, Accepted(0 * ones[:, None], ones, following))
    chains = [
        ConfidentChain(3, beta).build(speaking, state, 3).tokens_BN[0].tolist()
        for beta in (0.0, 0.3, 0.6, 0.9, 0.99, 1.1)
    ]
    assert all(one[: len(other)] == other for one, other in pairwise(chains))
    assert len(chains[0]) == 4 and len(chains[-1]) == 1 and len(set(map(len, chains))) > 2


def test_mistakes_are_one_line() -> None:
    for arguments, words in (
        ({"span": 1}, "span must be from 2"),
        ({"outside": 1.5}, "outside"),
        ({"units": 0}, "units"),
        ({"placed": "x"}, "placed"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(ValueError, match=words):
            LUD(TARGET.shape, **arguments)
    with pytest.raises(ValueError, match="needs a Llama-type target"):
        lud(tiny_target("gpt2"))
    with pytest.raises(ValueError, match="chain depth"):
        ConfidentChain(0)

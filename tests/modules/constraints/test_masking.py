"""Constrained speculation is constrained plain decoding: the same greedy tokens, the same
distribution, for trees chosen by value and drawn ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from modules.constraints.forced import ForcedTokens
from modules.constraints.masking import MaskedDrafter, States
from modules.constraints.predicate import Predicate
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.lookahead import Lookahead
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.drafters.retrieval.suffix_automaton import Suffix
from modules.drafters.retrieval.token_recycling import TokenRecycling
from modules.drafters.small_models.independent import Independent
from modules.target.generation_config import stock_generate
from modules.target.target import Target
from modules.trees.sampled.branching import branching_tree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import ScriptedDrafter, tiny_target
from tests.modules.constraints.automata import Remainders
from tests.modules.sampling import goodness, small_target

PROMPTS = [[7, 9, 11, 30], [12, 8], [9, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(seed=3)


def independent(target: Target, vocabulary: int | None = None) -> Drafter:
    drafter = Independent(target.shape, layers=1, draft_vocabulary=vocabulary)
    drafter.initialise(target)
    return drafter.double().eval()


def decoders(target: Target) -> dict[str, SpeculativeDecoder]:
    shape, ends = target.shape, frozenset({-1})
    made = independent(target)
    return {
        "scripted": SpeculativeDecoder(target, ScriptedDrafter(shape, 0.6, decoys=2)),
        "lookup": SpeculativeDecoder(target, PromptLookup(shape)),
        "tree": SpeculativeDecoder(target, made, builder=StaticTree([[0], [1], [0, 0]])),
        "chain": SpeculativeDecoder(target, made, builder=SampledChain(3)),
        "forced": SpeculativeDecoder(target, ForcedTokens(shape), stop_ids=ends),
    }


@pytest.mark.parametrize("name", ["scripted", "lookup", "tree", "chain", "forced"])
def test_greedy_answers_are_those_of_plain_constrained_decoding(name: str, target) -> None:
    constraint = Remainders(128)
    sampling, decoder = Sampling(constraint=constraint), decoders(target)[name]
    plain = SpeculativeDecoder(target, stop_ids=decoder.stop_ids)
    expected = [plain.decode([prompt], sampling, 14)[0].ids for prompt in PROMPTS]
    assert all(constraint.valid(ids[:-1]) for ids in expected)
    assert expected != [trace.ids for trace in plain.decode(PROMPTS, Sampling(), 14)]
    alone = [decoder.decode([prompt], sampling, 14)[0] for prompt in PROMPTS]
    together = decoder.decode(PROMPTS, sampling, 14)
    assert [trace.ids for trace in alone] == expected == [trace.ids for trace in together]
    # One forced token in three places, drafted and accepted.
    assert sum(trace.forced for trace in alone) >= 6
    assert sum(trace.forced for trace in together) >= (0 if name == "chain" else 6)


def test_plain_decoding_drafts_nothing_and_is_what_generate_gives(target) -> None:
    sampling = Sampling(constraint=Remainders(128))
    for prompt in PROMPTS:
        trace = SpeculativeDecoder(target).decode([prompt], sampling, 12)[0]
        assert trace.forced == 0 and set(trace.accepted) == {1} and trace.masks == len(trace.ids)
        assert [trace.ids] == stock_generate(target.stock, [prompt], sampling, 12, target.eos_ids)


def test_each_prompt_of_a_batch_has_its_own_constraint(target) -> None:
    constraint, decoder = Remainders(128), decoders(target)["scripted"]
    traces = decoder.decode(PROMPTS, Sampling(constraint=[constraint, None, constraint]), 10)
    free = decoder.decode(PROMPTS, Sampling(), 10)
    whole = decoder.decode(PROMPTS, Sampling(constraint=constraint), 10)
    expected = [whole[0].ids, free[1].ids, whole[2].ids]
    assert [trace.ids for trace in traces] == expected
    with pytest.raises(ValueError, match="1 constraints for 3 prompts"):
        decoder.decode(PROMPTS, Sampling(constraint=[constraint]), 10)


BUILDERS = {
    "point": StaticTree([[0], [1], [0, 0], [0, 1], [1, 0]]),
    "ratio": SampledChain(3),
    "recursive": branching_tree([2, 2]),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("vocabulary", [None, 4])
def test_sampled_answers_have_the_constrained_distribution(name, vocabulary) -> None:
    """Against the distributions that `generate` draws from under the same constraint."""
    target = small_target()
    sampling = Sampling(temperature=1.3, constraint=Remainders(6))
    decoder = SpeculativeDecoder(
        target,
        independent(target, vocabulary),
        builder=BUILDERS[name],
        budget=6,
        stop_ids=frozenset({-1}),
    )
    start = 2 if vocabulary is None else 1
    assert goodness(decoder, [3, 1], sampling, 1000, start=start - 1) > 1e-3


def test_builders_see_masked_distributions(target) -> None:
    """Drafts follow the constraint at every depth, over a trimmed vocabulary too."""
    for vocabulary in (None, 40):
        drafter, constraint = independent(target, vocabulary), Remainders(128)
        seen: list[list[int]] = []
        builder = BUILDERS["recursive"]

        class Watching:
            sibling_draw, depth = builder.sibling_draw, builder.depth

            def build(self, masked, state, budget, builder=builder, seen=seen):
                assert isinstance(masked, MaskedDrafter)
                tree = builder.build(masked, state, budget)
                for tokens, usable in zip(tree.tokens_BN.tolist(), tree.acceptable_BN.tolist()):
                    seen.append([t if use else -1 for t, use in zip(tokens, usable)])
                return tree

        decoder = SpeculativeDecoder(target, drafter, builder=Watching(), budget=6)
        trace = decoder.decode([PROMPTS[0]], Sampling(1.0, constraint=constraint), 14)[0]
        checked, place = 0, 1
        trees = iter(seen)
        for count, nodes in zip(trace.accepted, trace.nodes, strict=True):
            if nodes > 1:
                tree, parents = next(trees), [-1, 0, 0, 1, 1, 2, 2]
                assert tree[0] == trace.ids[place - 1]
                for node in range(1, len(tree)):
                    path = [tree[node]]
                    while (parent := parents[node]) > 0:
                        path, node = [tree[parent], *path], parent
                    if -1 not in path and vocabulary is None:
                        assert constraint.valid([*trace.ids[:place], *path])
                        checked += 1
            place += count
        assert checked > 5 or vocabulary is not None


def test_nothing_allowed_ends_the_answer(target) -> None:
    """A predicate may lead into a dead end; the answer ends there."""
    dead = Predicate(lambda ids: len(ids) < 4, 128, target.eos_ids)
    trace = SpeculativeDecoder(target).decode([[7, 9]], Sampling(constraint=dead), 10)[0]
    assert len(trace.ids) == 4 and trace.ids[-1] in target.eos_ids and dead.calls == 4 * 128
    with pytest.raises(ValueError, match="none ends an answer"):
        SpeculativeDecoder(target, stop_ids=frozenset()).decode(
            [[7, 9]], Sampling(constraint=dead), 10
        )


@pytest.mark.parametrize("name", ["plain", "scripted"])
def test_ends_are_told_apart(name: str, target) -> None:
    """Whole answers, those that the limit or a stop string cuts off, and dead ends."""
    (end,) = target.eos_ids

    def three(ids: tuple[int, ...]) -> bool:
        return end not in ids[:3] and (len(ids) < 4 or ids[3:] == (end,))

    made: dict[str, SpeculativeDecoder] = {"plain": SpeculativeDecoder(target), **decoders(target)}
    each = [Predicate(three, 128, target.eos_ids), Predicate(lambda ids: len(ids) < 3, 128), None]
    for limit, ends in ((8, ["whole", "dead", ""]), (3, ["cut", "dead", ""]), (2, ["cut"] * 2)):
        traces = made[name].decode(PROMPTS, Sampling(constraint=each), limit)
        assert [trace.end for trace in traces][: len(ends)] == ends
    figures = made[name].quality_of(made[name].decode(PROMPTS, Sampling(constraint=each), 8))
    assert [figures[f"{kind}_share"] for kind in ("whole", "cut", "dead")] == [0.5, 0.0, 0.5]
    assert not made[name].quality_of(made[name].decode(PROMPTS, Sampling(), 3))
    first = made[name].decode([PROMPTS[0]], Sampling(constraint=each[0]), 1)[0].ids
    stopped = Sampling(constraint=each[0], stop_strings=[target.tokenizer.decode(first)])
    assert made[name].decode([PROMPTS[0]], stopped, 8)[0].end == "cut"


def test_a_batch_of_generate_ends_as_ours(target) -> None:
    """Rows that have ended are padded; where nothing is allowed, an end token is."""
    ends = [Predicate(lambda ids, n=n: len(ids) < n, 128, target.eos_ids) for n in (3, 6)]
    sampling = Sampling(constraint=ends)
    traces = SpeculativeDecoder(target).decode(PROMPTS[:2], sampling, 10)
    assert [len(trace.ids) for trace in traces] == [3, 6]
    rows = stock_generate(target.stock, PROMPTS[:2], sampling, 10, target.eos_ids)
    assert rows == [trace.ids for trace in traces]


@pytest.mark.parametrize("name", ["scripted", "chain"])
def test_other_settings_hold_under_a_constraint(name: str, target) -> None:
    """Penalties and stop strings change drafted answers as plain ones."""
    free = SpeculativeDecoder(target).decode(PROMPTS, Sampling(constraint=Remainders(128)), 14)
    stops = [target.tokenizer.decode(free[0].ids[6:7])]
    sampling = Sampling(
        constraint=Remainders(128), repetition_penalty=1.4, presence_penalty=0.5, stop_strings=stops
    )
    expected = SpeculativeDecoder(target).decode(PROMPTS, sampling, 14)
    assert [trace.ids for trace in expected] != [trace.ids for trace in free]
    traces = decoders(target)[name].decode(PROMPTS, sampling, 14)
    ids = [trace.ids for trace in traces]
    assert ids == [trace.ids for trace in expected]


def test_a_complete_answer_ends_before_its_least_length(target) -> None:
    """Only an end token is allowed, and `min_new_tokens` forbids it: the constraint decides."""

    def three(ids: tuple[int, ...]) -> bool:
        return len(ids) < 4 or ids[3:] == (min(target.eos_ids),)

    sampling = Sampling(constraint=Predicate(three, 128, target.eos_ids), min_new_tokens=8)
    for decoder in (SpeculativeDecoder(target), decoders(target)["scripted"]):
        (trace,) = decoder.decode([[7, 9]], sampling, 12)
        assert len(trace.ids) == 4 and trace.ids[-1] in target.eos_ids
        assert not set(trace.ids[:-1]) & target.eos_ids


def test_nothing_follows_an_end_token() -> None:
    predicate = Predicate(lambda ids: True, 8, {0})
    ended = predicate.start().advance(0)
    assert ended is not None and predicate.calls == 1
    assert not ended.allows(3) and not ended.allowed().any() and predicate.calls == 1


def test_a_constraint_of_another_vocabulary_is_refused(target) -> None:
    constraint = Predicate(lambda ids: True, 100, target.eos_ids)
    with pytest.raises(ValueError, match="it knows 100 tokens, the target 128"):
        SpeculativeDecoder(target).decode([[7, 9]], Sampling(constraint=constraint), 4)


def test_states_are_those_of_the_whole_prefix() -> None:
    states, constraint = States([Remainders(6), None]), Remainders(6)
    answer: list[int] = []
    for _ in range(4):
        answer.append(int(walk(constraint, answer).allowed().nonzero()[0]))
    assert states.follow(0, answer[:2]) == 0 and states.follow(1, answer) is None
    assert states.after(0, tuple(answer[2:])) == walk(constraint, answer)
    assert states.follow(0, answer) == 0 and states.follow(0, answer[:-1]) == 1
    assert states.after(0, ()) == walk(constraint, answer)
    assert states.after(0, (5 if walk(constraint, answer).advance(5) is None else 4, 1)) is None


def walk(constraint: Remainders, ids: list[int]):
    state = constraint.start()
    for token in ids:
        state = state.advance(token)
        assert state is not None
    return replace(state)


@pytest.mark.parametrize("kind", [Lookahead, Suffix, TokenRecycling])
def test_drafters_that_make_their_own_trees_stay_lossless(kind, target) -> None:
    sampling = Sampling(constraint=Remainders(128))
    expected = SpeculativeDecoder(target).decode(PROMPTS[:2], sampling, 12)
    traces = SpeculativeDecoder(target, kind(target.shape)).decode(PROMPTS[:2], sampling, 12)
    assert [trace.ids for trace in traces] == [trace.ids for trace in expected]
    assert (kind is Lookahead) == (sum(trace.forced for trace in traces) == 0)

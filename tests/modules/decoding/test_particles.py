"""Particles approach the exact posterior under a constraint, where masking does not; drafters
inside change nothing of that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from modules.constraints.predicate import Predicate
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.particles import ParticleDecoder, effective, systematic
from modules.drafters.retrieval.suffix_automaton import Suffix, SuffixState
from modules.drafters.small_models.independent import Independent
from modules.target.target import Target
from modules.trees.static import StaticTree
from tests.fakes import ScriptedDrafter, tiny_target
from tests.modules.sampling import small_target

PROMPT, LENGTH, SIZE = [3, 1], 3, 6
ENDLESS = frozenset({-1})


def accepts(ids: tuple[int, ...]) -> bool:
    """Many ways begin after token 0 or 1, few of which go on."""
    if len(ids) == 2:
        return ids[0] > 1 or ids[1] == 4
    return len(ids) < 3 or sum(ids) % 3 == 0


def exact(target: Target, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """p · ok of all answers, and what masking draws them with [V^3]."""
    joint, masked = torch.zeros(SIZE**LENGTH), torch.zeros(SIZE**LENGTH)
    for place, answer in enumerate(product(range(SIZE), repeat=LENGTH)):
        prob, drawn = 1.0, 1.0
        logits = target.model(torch.tensor([[*PROMPT, *answer]])).logits[0]
        for depth, token in enumerate(answer):
            probs = (logits[len(PROMPT) - 1 + depth] / sampling.temperature).softmax(-1)
            allowed = [accepts((*answer[:depth], other)) for other in range(SIZE)]
            prob *= float(probs[token]) * allowed[token]
            mass = float(probs[torch.tensor(allowed)].sum())
            drawn *= float(probs[token]) * allowed[token] / mass if mass else 0.0
        joint[place], masked[place] = prob, drawn
    return joint, masked


def place_of(ids: list[int]) -> int:
    return (ids[0] * SIZE + ids[1]) * SIZE + ids[2]


def drafter(target: Target) -> Independent:
    made = Independent(target.shape, layers=1)
    made.initialise(target)
    return made.double().eval()


@pytest.mark.parametrize("drafting", [False, True])
def test_the_posterior_is_the_exact_one_and_that_of_masking_is_not(drafting: bool) -> None:
    target, sampling = small_target(), Sampling(1.4)
    with torch.no_grad():
        joint, masked = exact(target, sampling)
    posterior = joint / joint.sum()
    assert float((posterior - masked).abs().sum()) / 2 > 0.15, "masking is biased here"
    decoder = ParticleDecoder(
        target,
        drafter(target) if drafting else None,
        builder=StaticTree([[0], [1], [0, 0]]) if drafting else None,
        stop_ids=ENDLESS,
        particles=12,
    )
    runs, groups = 12, 25
    estimates = torch.zeros(runs * groups, SIZE**LENGTH, dtype=torch.float64)
    resampled = 0
    for run in range(runs):
        constraint = Predicate(accepts, SIZE)
        seeded = Sampling(1.4, seed=1000 * run, constraint=constraint)
        found = decoder.weighted([PROMPT] * groups, seeded, LENGTH)
        for group, traces in enumerate(found):
            for trace in traces:
                if trace.log_weight > -math.inf:
                    weight = math.exp(trace.log_weight) / len(traces)
                    assert len(trace.ids) == LENGTH
                    estimates[run * groups + group, place_of(trace.ids)] += weight
            weights = {trace.log_weight for trace in traces}
            resampled += len(weights) < len(traces)
    assert resampled > 10
    # 1. Unbiased for p · ok of every answer: no deviation beyond its error.
    mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    likely = joint > 0.004
    assert float(((mean - joint) / error.clamp(min=1e-9))[likely].abs().max()) < 4
    totals = estimates.sum(1)
    assert abs(float(totals.mean() - joint.sum())) < 4 * float(totals.std()) / len(totals) ** 0.5
    assert not mean[joint == 0].any()
    # 2. Close to the posterior, and closer than masking is.
    distance = float((mean / mean.sum() - posterior).abs().sum()) / 2
    assert distance < 0.08 < float((masked - posterior).abs().sum()) / 2


@pytest.mark.parametrize("right", [None, 0.6])
def test_greedy_answers_are_those_under_a_mask_with_few_calls(right: float | None) -> None:
    target = tiny_target(seed=3)
    prompts = [[7, 9], [12, 8, 30]]

    def good(ids: tuple[int, ...]) -> bool:
        return (sum(ids) + ids[-1]) % 3 != 1

    masking, asking = (Predicate(good, 128, target.eos_ids) for _ in range(2))
    expected = SpeculativeDecoder(target).decode(prompts, Sampling(constraint=masking), 14)
    made = None if right is None else ScriptedDrafter(target.shape, right)
    decoder = ParticleDecoder(target, made, particles=1)
    traces = decoder.decode(prompts, Sampling(constraint=asking), 14)
    assert [trace.ids for trace in traces] == [trace.ids for trace in expected]
    assert asking.calls * 20 < masking.calls
    assert right is None or max(trace.accepted[0] for trace in traces) > 1


def test_draws_ask_a_dear_predicate_about_few_tokens() -> None:
    target = tiny_target(seed=3)
    constraint = Predicate(lambda ids: (sum(ids) + ids[-1]) % 3 != 1, 128, target.eos_ids)
    decoder = ParticleDecoder(target, particles=4)
    (traces,) = decoder.weighted([[7, 9]], Sampling(1.0, constraint=constraint), 12)
    tokens = sum(len(trace.ids) for trace in traces)
    assert constraint.calls * 20 < 128 * tokens, "a mask asks about all 128 for each token"


def test_one_particle_draws_as_under_a_mask() -> None:
    target = small_target()
    with torch.no_grad():
        _, masked = exact(target, Sampling(1.4))
    decoder = ParticleDecoder(target, stop_ids=ENDLESS, particles=1)
    counts = torch.zeros(SIZE**LENGTH)
    for run in range(3):
        constraint = Predicate(accepts, SIZE)
        sampling = Sampling(1.4, seed=1000 * run, constraint=constraint)
        for trace in decoder.decode([PROMPT] * 500, sampling, LENGTH):
            counts[place_of(trace.ids)] += 1
    assert float((counts / counts.sum() - masked).abs().sum()) / 2 < 0.06


def test_an_impossible_constraint_leaves_weight_0_and_a_warning(caplog) -> None:
    target = small_target()
    impossible = Predicate(lambda ids: len(ids) < 2, SIZE)
    sampling = Sampling(1.0, constraint=[impossible, Predicate(lambda ids: True, SIZE), None])
    decoder = ParticleDecoder(target, stop_ids=ENDLESS, particles=3)
    dead, alive, free = decoder.weighted([PROMPT] * 3, sampling, 4)
    assert [trace.log_weight for trace in dead] == [-math.inf] * 3
    ends = [{trace.end for trace in traces} for traces in (dead, alive, free)]
    assert ends == [{"dead"}, {"cut"}, {""}] and not caplog.text
    traces = decoder.decode([PROMPT] * 3, sampling, 4)
    assert "no particle of 1 of 3 prompts found an answer" in caplog.text
    assert [trace.end for trace in traces] == ["dead", "cut", ""]
    assert decoder.quality_of(traces) == {"whole_share": 0.0, "cut_share": 0.5, "dead_share": 0.5}


def test_a_dead_particle_is_not_whole_where_it_ends_with_an_allowed_token() -> None:
    """The end token has too little probability to be looked for."""
    target = tiny_target(seed=3)
    ends, rare = min(target.eos_ids), Sampling(1.0, logit_bias={min(tiny_target().eos_ids): -50})
    constraint = Predicate(lambda ids: len(ids) < 3 or ids[2:] == (ends,), 128, target.eos_ids)
    sampling = replace(rare, constraint=constraint)
    (trace,) = ParticleDecoder(target, particles=2).decode([[7, 9]], sampling, 6)
    assert (trace.end, trace.log_weight, trace.ids[2:]) == ("dead", -math.inf, [ends])


def test_what_would_be_cut_off_does_not_weigh() -> None:
    """Behind the limit and behind a stop string, where here nothing is allowed."""
    target = tiny_target(seed=3)
    plain = SpeculativeDecoder(target).decode([[7, 9]], Sampling(), 5)[0].ids
    decoder = ParticleDecoder(target, ScriptedDrafter(target.shape, 1.0), particles=2)
    constraint = Predicate(lambda ids: len(ids) < 3, 128, target.eos_ids)
    for limit, stops in ((2, []), (5, [target.tokenizer.decode(plain[1:2])])):
        sampling = Sampling(constraint=constraint, stop_strings=stops)
        (traces,) = decoder.weighted([[7, 9]], sampling, limit)
        assert [trace.log_weight for trace in traces] == [0.0, 0.0]
        assert [trace.ids for trace in traces] == [plain[:2]] * 2


def test_prompts_without_a_constraint_are_drawn_as_plain_decoding_draws() -> None:
    """Each from its own generator, whatever stands beside it in the batch."""
    target, prompts = small_target(), [PROMPT, [2, 4], [1, 5]]
    sampling = Sampling(1.0, seed=5, constraint=[Predicate(accepts, SIZE), None, None])
    decoder = ParticleDecoder(target, stop_ids=ENDLESS, particles=1)
    traces = decoder.decode(prompts, sampling, LENGTH)
    plain = SpeculativeDecoder(target, stop_ids=ENDLESS)
    expected = plain.decode(prompts, Sampling(1.0, seed=5), LENGTH)
    assert [trace.ids for trace in traces[1:]] == [trace.ids for trace in expected[1:]]
    with pytest.raises(ValueError, match="3 constraints for 2 prompts"):
        decoder.decode(prompts[:2], sampling, LENGTH)


def test_which_particle_answers_does_not_depend_on_its_draws() -> None:
    target, runs, counts = small_target(), 700, torch.zeros(SIZE)
    with torch.no_grad():
        probs = (target.model(torch.tensor([PROMPT])).logits[0, -1] / 5).softmax(-1)
    decoder = ParticleDecoder(target, stop_ids=ENDLESS, particles=2)
    for run in range(runs):
        sampling = Sampling(5.0, seed=10 * run, constraint=Predicate(lambda ids: True, SIZE))
        counts[decoder.decode([PROMPT], sampling, 1)[0].ids[0]] += 1
    error = (probs * (1 - probs) / runs).sqrt()
    assert float(((counts / runs - probs).abs() / error).max()) < 4


def test_the_streamed_answer_is_the_decoded_one() -> None:
    decoder = ParticleDecoder(small_target(), stop_ids=ENDLESS, particles=8)
    for seed in range(6):
        sampling = Sampling(1.4, seed=seed, constraint=Predicate(accepts, SIZE))
        trace = decoder.decode([PROMPT], sampling, LENGTH)[0]
        streamed = list(decoder.stream(PROMPT, sampling, LENGTH))
        assert [token for token, _ in streamed] == trace.ids


def test_resampled_particles_have_drafter_states_of_their_own() -> None:
    class Watched(Suffix):
        calls = 0

        def propose(self, state, budget):
            assert isinstance(state, SuffixState)
            assert [automaton.text for automaton in state.automata] == state.texts()
            Watched.calls += 1
            return super().propose(state, budget)

    target = small_target()
    decoder = ParticleDecoder(
        target, Watched(target.shape), stop_ids=ENDLESS, particles=6, threshold=1.0
    )
    sampling = Sampling(1.4, constraint=Predicate(accepts, SIZE))
    decoder.weighted([PROMPT] * 4, sampling, 9)
    assert Watched.calls > 4


def test_resampling() -> None:
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64).log()
    assert effective(weights) == pytest.approx(1 / 0.375)
    assert effective(torch.full((3,), -math.inf)) == math.inf
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(2000):
        chosen = systematic(weights, generator)
        assert chosen[:2] == [0, 0] and 3 not in chosen
        counts += torch.bincount(torch.tensor(chosen), minlength=4)
    torch.testing.assert_close(counts / 2000, weights.exp().float() * 4, atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"particles": 0}, "at least 1"), ({"rule": 1}, "rule")]
)
def test_settings_that_cannot_be_are_refused(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        ParticleDecoder(small_target(), **wrong)

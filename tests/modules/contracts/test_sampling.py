"""Target and drafter are warped alike, as Hugging Face's `generate` warps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from modules.acceptance.rules import Draws
from modules.contracts.drafter import DraftState, Frontier, TreeBuilder
from modules.contracts.sampling import Sampling, likeliest, warped_probs
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.drafters.trained import TrainedDrafter
from modules.target.target import Target
from modules.trees.sampled.branching import branching_tree, chains
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.dyspec import DySpecTree
from modules.trees.sampled.sequoia import sequoia_tree
from modules.trees.sampled.stochastic_beam import StochasticBeamTree
from tests.fakes import tiny_target
from tests.modules.sampling import generate_probs

TEXTS = [[3, 1, 9], [7, 2, 30], [40, 8, 11]]
SETTINGS = [
    Sampling(0.7),
    Sampling(1.0, top_k=3),
    Sampling(1.0, top_p=0.8),
    Sampling(0.6, 5, 0.7),
    Sampling(2, 40, 0.9),
    Sampling(3.0, 6, 0.5),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_the_distribution_is_the_one_that_generate_draws_from(sampling: Sampling) -> None:
    target = tiny_target()
    logits = target.model(torch.tensor(TEXTS)).logits[:, -1].detach()
    expected = generate_probs(target, TEXTS, sampling)
    assert int((expected > 0).sum(-1).min()) > 1
    for probs in (warped_probs(logits, sampling), Draws(sampling, []).probs(logits)):
        torch.testing.assert_close(probs, expected, atol=1e-6, rtol=0)


def test_the_order_of_the_warpers_matters() -> None:
    """Else the test above could not find a wrong one."""
    logits = torch.log(torch.tensor([[0.4, 0.25, 0.2, 0.1, 0.05]], dtype=torch.float64))
    probs = warped_probs(logits, Sampling(1.0, top_k=3, top_p=0.75))
    turned = LogitsProcessorList([TopPLogitsWarper(0.75), TopKLogitsWarper(3)])
    ids: Any = torch.empty(0, dtype=torch.long)
    other = torch.as_tensor(turned(ids, cast(Any, logits))).softmax(-1)
    assert (probs > 0).sum() == 2 and (other > 0).sum() == 3
    hot = warped_probs(logits, Sampling(3.0, top_p=0.6))
    assert (hot > 0).sum() == 3 and (warped_probs(logits, Sampling(1.0, top_p=0.6)) > 0).sum() == 2


def test_the_likeliest_token_alone_is_greedy_decoding() -> None:
    target = tiny_target()
    decoder = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    greedy, narrow = (
        decoder.decode(TEXTS, sampling, 12) for sampling in (Sampling(), Sampling(1.7, top_k=1))
    )
    assert [trace.ids for trace in narrow] == [trace.ids for trace in greedy]
    for text, trace in zip(TEXTS, greedy, strict=True):
        expected = target.stock.generate(
            torch.tensor([text]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert trace.ids == expected[0, len(text) :].tolist()


# -- the drafter's distributions
# ----------------------------------------------------------------------------


def copied_model(target: Target) -> TrainedDrafter:
    drafter = Independent(target.shape, layers=target.shape.num_layers)
    drafter.initialise(target)
    return drafter.double().eval()


def copied_layers(target: Target) -> TrainedDrafter:
    drafter = S2D(target.shape, exits=[target.shape.num_layers])
    drafter.initialise(target)
    return drafter.double().eval()


BUILDERS = {
    "chain": SampledChain(3),
    "branching": branching_tree([2, 2]),
    "chains": chains(2, 3),
    "beam": StochasticBeamTree(2, 2),
    "dyspec": DySpecTree(2),
    "sequoia": sequoia_tree([[0.7, 0.2]], 5, 2),
}


@pytest.mark.parametrize("made", [copied_model, copied_layers])
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("sampling", SETTINGS[1:4], ids=str)
def test_the_target_as_its_own_drafter_is_accepted_whatever_warps(
    made: Callable[[Target], TrainedDrafter], name: str, sampling: Sampling
) -> None:
    """Every first draw is kept, and so are all levels where each node has a child."""
    target, builder = tiny_target(), BUILDERS[name]
    decoder = SpeculativeDecoder(
        target, made(target), builder=builder, budget=6, stop_ids=frozenset({-1})
    )
    for trace in decoder.decode(TEXTS, sampling, 13):
        assert min(trace.accepted[:-1]) >= 2
        if name in ("chain", "branching", "chains"):
            assert set(trace.accepted[:-1]) == {builder.depth + 1}


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
def test_drafts_are_drawn_as_the_target_is_and_travel_with_that_distribution(
    builder: TreeBuilder,
) -> None:
    target, sampling = tiny_target(), Sampling(1.3, 4, 0.8)
    drafter = copied_model(target)
    watching = Watching(builder, sampling)
    SpeculativeDecoder(target, drafter, builder=watching, budget=6).decode(TEXTS, sampling, 8)
    assert watching.nodes >= 18


class Watching:
    """Another builder, whose nodes must all have a warped distribution that the drafter gave."""

    def __init__(self, builder: TreeBuilder, sampling: Sampling) -> None:
        self.builder, self.sampling, self.nodes = builder, sampling, 0
        self.sibling_draw, self.depth = builder.sibling_draw, builder.depth

    def build(self, drafter: Any, state: DraftState, budget: int) -> TokenTree:
        heard = RecordingDrafter(drafter, self.sampling)
        tree = self.builder.build(cast(Any, heard), state, budget)
        probs_BRD = torch.cat(heard.distributions, 1)
        for b, node in tree.acceptable_BN[:, 1:].nonzero().tolist():
            assert tree.probs_BRD is not None and tree.prob_rows_BN is not None
            probs_D = tree.probs_BRD[b, tree.prob_rows_BN[b, node + 1]]
            assert float((probs_BRD[b] - probs_D).abs().sum(-1).min()) < 1e-9
            self.nodes += 1
        return tree


class RecordingDrafter:
    """A drafter, and the warped distributions of what it answers."""

    def __init__(self, drafter: Any, sampling: Sampling) -> None:
        self.drafter, self.sampling, self.vocabulary_D = drafter, sampling, drafter.vocabulary_D
        self.distributions: list[Tensor] = []

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        logits_BWD = self.drafter.expand(state, frontier)
        self.distributions.append(warped_probs(logits_BWD, self.sampling))
        return logits_BWD


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -0.5},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"top_p": 0.0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": math.inf},
    ],
)
def test_settings_that_no_warper_takes_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must .*, got {value}$"):
        Sampling(**cast(Any, wrong))


def test_whole_numbers_are_settings_too() -> None:
    sampling = Sampling(2, top_k=3, top_p=1)
    assert sampling == Sampling(2.0, 3, 1.0) and isinstance(sampling.temperature, float)
    probs = warped_probs(torch.randn(2, 9), sampling)
    assert ((probs > 0).sum(-1) == 3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [8192, 8200, 9001, 12])
def test_the_likeliest_is_the_first_maximum(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    # Few values, so that most rows have their maximum many times, in one block and in others.
    logits = torch.randint(-9, 4, (2, 5, size), generator=generator).to(dtype)
    logits[0, 0], logits[0, 1, -1], logits[0, 2, 3] = -math.inf, 7, math.nan
    logits[1] = torch.randn(5, size, generator=generator).to(dtype)
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    first = (logits[0, 3:] == logits[0, 3:].amax(-1, keepdim=True)).int().cumsum(-1)
    assert likeliest(logits)[0, 3:].tolist() == (first == 0).sum(-1).tolist()

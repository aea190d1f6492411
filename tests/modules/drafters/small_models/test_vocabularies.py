"""Models of one tokenizer that pad their vocabularies differently draft for each other, and change
nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from eval.methods.huggingface import HuggingFaceAssisted
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.entropy_adaptive import EntropyAdaptive
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.on_policy import written
from modules.drafters.small_models.s2d import S2D
from modules.drafters.trained import TrainedDrafter
from modules.target.target import Target
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.chain import SampledChain
from tests.fakes import tiny_batch, tiny_target, tiny_tokenizer

PIECES = 24
PROMPTS = [[7, 8, 9, 10], [20, 11], [12, 13, 14, 15, 16]]
SIZES = [(26, 32), (32, 26)]
"""Rows of the drafter and of the target, whose tokenizer has fewer: random models say padding ids
too.
"""


def padded(rows: int, arch: str = "llama", **arguments: Any) -> Target:
    """A target of so many rows with the tokenizer of `PIECES` pieces."""
    target = tiny_target(arch, vocab=rows, **arguments)
    target.tokenizer = tiny_tokenizer(PIECES)
    return target


@pytest.fixture(params=SIZES, ids=["larger target", "smaller target"])
def sizes(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def named(rows: int, target: Target, tmp_path: Path, **arguments: Any) -> Independent:
    """A drafter that begins as a plain model of so many rows."""
    small = padded(rows, "gpt2", seed=5)
    small.stock.save_pretrained(tmp_path / "small")
    small.tokenizer.save_pretrained(tmp_path / "small")
    made = Independent(target.shape, model=str(tmp_path / "small"), **arguments)
    made.initialise(target)
    return made.double().eval()


def served(rows: int, target: Target, tmp_path: Path, draft_vocabulary: int | None) -> S2D:
    """An S2D drafter of a target of so many rows, saved, and loaded for another."""
    first = padded(rows, layers=3)
    made = S2D(first.shape, [1, 3], draft_vocabulary=draft_vocabulary)
    if draft_vocabulary:
        made.set_vocabulary(range(rows - draft_vocabulary, rows))
    made.initialise(first)
    save_pretrained(made.double(), tmp_path / "sorted", Provenance.of(first))
    found = load_pretrained(tmp_path / "sorted", target)
    assert isinstance(found, S2D)
    return found.double().eval()


def shared_ids(drafter: TrainedDrafter, target: Target) -> list[int]:
    return (
        list(range(target.shape.vocab_size))
        if drafter.vocabulary_D is None
        else drafter.vocabulary_D.tolist()
    )


@pytest.mark.parametrize("builder", [None, RerankedTree(3, 2)])
@pytest.mark.parametrize("draft_vocabulary", [None, 12])
def test_greedy_answers_are_the_targets_whatever_either_pads_to(
    sizes: tuple[int, int], draft_vocabulary: int | None, builder: Any, tmp_path: Path
) -> None:
    target = padded(sizes[1], layers=3)
    plain = [trace.ids for trace in SpeculativeDecoder(target).decode(PROMPTS, Sampling(), 16)]
    assert any(token >= min(sizes) for ids in plain for token in ids) or sizes[1] < sizes[0], (
        "padding is said"
    )
    for drafter in (
        named(sizes[0], target, tmp_path, draft_vocabulary=draft_vocabulary),
        served(sizes[0], target, tmp_path, draft_vocabulary),
    ):
        ids = shared_ids(drafter, target)
        assert ids and max(ids) < min(sizes) and len(ids) == drafter.draft_size
        assert draft_vocabulary is not None or ids == list(range(min(sizes)))
        traces = SpeculativeDecoder(drafter.adapt(target), drafter, builder=builder).decode(
            PROMPTS, Sampling(), 16
        )
        assert [trace.ids for trace in traces] == plain


@pytest.mark.parametrize("kind", ["named", "served"])
@pytest.mark.parametrize("draft_vocabulary", [None, 8])
def test_the_sampled_distribution_is_the_targets_with_mass_outside(
    sizes: tuple[int, int], kind: str, draft_vocabulary: int | None, tmp_path: Path
) -> None:
    """Chi-square of the second token's frequencies behind a fixed first one, through the whole
    loop.
    """
    target = padded(sizes[1])
    drafter = (
        named(sizes[0], target, tmp_path, draft_vocabulary=draft_vocabulary)
        if kind == "named"
        else served(sizes[0], target, tmp_path, draft_vocabulary)
    )
    decoder = SpeculativeDecoder(drafter.adapt(target), drafter, builder=SampledChain(2))
    traces = decoder.decode([[7, 8]] * 3000, Sampling(1.0, seed=7), 2)
    firsts = torch.tensor([trace.ids[0] for trace in traces])
    first = int(firsts[firsts > max(target.eos_ids)].mode().values)
    seconds = torch.tensor([trace.ids[1] for trace in traces if trace.ids[0] == first])
    probs = target.stock(torch.tensor([[7, 8, first]])).logits[0, -1].softmax(-1)
    expected, found = probs * len(seconds), seconds.bincount(minlength=sizes[1])
    common = expected > 5
    statistic = ((found - expected) ** 2 / expected)[common].sum()
    assert len(seconds) > 300 and float(statistic) < 20 + 2.5 * int(common.sum())


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_what_pads_differently_trains(
    sizes: tuple[int, int], divergence: str, tmp_path: Path
) -> None:
    target = padded(sizes[1])
    drafter = named(
        sizes[0], target, tmp_path, divergence=divergence, own_text=1.0, own_tokens=4
    ).train()
    batch = tiny_batch(target)
    loss = drafter.loss(batch, target, 0.0).total
    loss.backward()
    assert bool(loss.isfinite()) and all(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in drafter.parameters()
    )
    drafted = drafter.tokens_D
    text = written(drafter.language_model, [torch.tensor([7, 8])] * 400, 4, drafted)
    assert drafted is None or int(text.input_ids.max()) < min(sizes)
    assert drafted is not None or sizes[0] == min(sizes)


@torch.no_grad()
def test_acceptance_is_of_the_whole_distribution(sizes: tuple[int, int], tmp_path: Path) -> None:
    target = padded(sizes[1])
    drafter, batch = named(sizes[0], target, tmp_path), tiny_batch(target)
    found = drafter.loss(batch, target, 1.0).metrics["acceptance_0"]
    expected, small = [], drafter.stock
    for row, documents in enumerate(batch.document_ids):
        for place in batch.loss_mask[row].nonzero()[:, 0].tolist():
            text = batch.input_ids[row, :place][documents[:place] == documents[place]]
            if len(text) > 1:
                p = target.stock(text[None]).logits[0, -1].softmax(-1)
                logits = small(text.clamp(max=sizes[0] - 1)[None]).logits[0, -1, : sizes[1]]
                q = torch.nn.functional.pad(
                    logits, (0, sizes[1] - len(logits)), value=-torch.inf
                ).softmax(-1)
                expected.append(float(torch.minimum(p, q).sum()))
    assert float(found.total) == pytest.approx(sum(expected), rel=1e-4) and int(found.count) == len(
        expected
    )


def test_hugging_faces_assisted_decoding_takes_it_too(
    sizes: tuple[int, int], tmp_path: Path
) -> None:
    target = padded(sizes[1], layers=3)
    drafter = named(sizes[0], target, tmp_path, draft_length=3)
    save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    assisted = HuggingFaceAssisted(target, tokens=3, assistant=str(tmp_path / "drafter"))
    within = [
        prompt
        for prompt in PROMPTS
        if max(SpeculativeDecoder(target).decode([prompt], Sampling(), 8)[0].ids[:-1]) < sizes[0]
    ]
    for prompt in within:
        plain = SpeculativeDecoder(target).decode([prompt], Sampling(), 8)[0]
        assert assisted.decode([prompt], Sampling(), 8)[0].ids == plain.ids
    assert assisted.assistant(torch.tensor([[7, 8]])).logits.shape[-1] == sizes[1]


def test_two_models_of_one_tokenizer_take_turns(sizes: tuple[int, int]) -> None:
    large, small = padded(sizes[1]), padded(sizes[0], seed=3)
    trace = EntropyAdaptive(large, small, threshold=20.0, shortest_run=1).decode(
        [[7, 8]], Sampling(1.5), 40
    )[0]
    assert any(trace.drafted) and max(trace.ids) < sizes[1]


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    target = padded(32)
    with pytest.raises(
        ValueError, match="draft_vocabulary is 30, but the drafter has 26 tokens only"
    ):
        named(26, target, tmp_path, draft_vocabulary=30)
    drafter = named(26, target, tmp_path, draft_vocabulary=3)
    with pytest.raises(ValueError, match="holds token 29, but the drafter has 26"):
        drafter.set_vocabulary([1, 2, 29])
    other = tiny_target(vocab=32)
    with pytest.raises(ValueError, match="give a drafter of the same tokenizer"):
        drafter.adapt(other)
    made = S2D(padded(26).shape, [1])
    with pytest.raises(ValueError, match="its tokenizer is not recorded"):
        made.adapt(target)
    assert made.adapt(padded(26)).shape.vocab_size == 26, "as drafters that were saved before"

"""Which labels and rows count: Clover-2's two terms, hard labels, and the order of a draft
vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.heads.hydra import Hydra
from modules.losses.chunked import cross_entropy, draft_labels, smooth_l1
from tests.fakes import tiny_batch, tiny_target

TARGET = tiny_target("llama")


def filled(drafter):
    batch = tiny_batch(TARGET)
    batch.states = TARGET.features(batch, drafter.training_states)
    return batch


@torch.no_grad()
def test_clover2_draws_every_counted_row_to_the_targets_state() -> None:
    """A row whose token cannot be drafted still has a state to come near to."""
    torch.manual_seed(0)
    drafter = Clover2(TARGET.shape, 2, draft_vocabulary=8).double().eval()
    drafter.initialise(TARGET)
    batch = filled(drafter)
    step = next(iter(drafter.steps(batch, TARGET)))
    assert bool((step.valid_M & ~step.counted_M).any()), (
        "the test needs rows outside the draft vocabulary"
    )
    states_MH = batch.states["final"].flatten(0, 1)[step.flat_M]
    distance = smooth_l1(step.feature_MH, states_MH)[step.valid_M].mean()
    expected = 10 * distance + step.losses_M[step.counted_M].sum() / step.counted_M.sum().clamp(
        min=1
    )
    torch.testing.assert_close(drafter.step_loss(step, batch), expected)


@torch.no_grad()
def test_rows_left_out_for_their_token_weigh_the_rest_by_the_mass_that_can_be_drafted() -> None:
    """Over all tokens that the target may have written, each as often as its distribution says: the
    loss of the others is the whole vocabulary's cross-entropy without the terms that no draft can
    have.
    """
    torch.manual_seed(0)
    drafter = Clover2(TARGET.shape, 2, draft_vocabulary=30).double().eval()
    drafter.set_vocabulary(torch.randperm(128)[:30])
    drafter.initialise(TARGET)
    batch = filled(drafter)
    step = next(iter(drafter.steps(batch, TARGET)))
    row, every = 3, torch.arange(128)
    feature = step.feature_MH[row].expand(128, -1)
    probs = TARGET.logits(batch.states["final"].flatten(0, 1)[step.flat_M[row]]).softmax(-1)
    labels = draft_labels(every, drafter.vocabulary_D)
    losses, _ = cross_entropy(
        feature,
        drafter.head(0, TARGET),
        labels,
        30,
        step.distributions,
        step.flat_M[row].expand(128),
    )
    log_draft = drafter.head(0, TARGET)(step.feature_MH[row]).log_softmax(-1)
    torch.testing.assert_close(
        (probs * losses).sum(), -(probs[drafter.vocabulary_D] * log_draft).sum()
    )


@pytest.mark.parametrize("kind", [Clover2, Hydra])
@torch.no_grad()
def test_hard_labels_are_the_datas_tokens(kind) -> None:
    torch.manual_seed(0)
    drafter = kind(TARGET.shape, 2, labels="hard").double().eval()
    batch = filled(drafter)
    step = next(iter(drafter.steps(batch, TARGET)))
    logits_MD = drafter.head(0, TARGET)(step.feature_MH)
    expected = torch.nn.functional.cross_entropy(
        logits_MD[step.valid_M], step.labels_M[step.valid_M], reduction="none"
    )
    assert step.distributions is None
    torch.testing.assert_close(step.losses_M[step.valid_M], expected)


def test_clover2_with_a_linear_start_starts_near_the_targets_state_and_decodes_losslessly() -> None:
    torch.manual_seed(0)
    drafter = Clover2(TARGET.shape, 2, fusion="linear").double().eval()
    drafter.initialise(TARGET)
    prompts = [[7, 8, 9, 10], [20, 30]]
    plain, drafted = (
        SpeculativeDecoder(TARGET, one).decode(prompts, Sampling(), 10) for one in (None, drafter)
    )
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]
    assert drafter.start_attention.linear.weight.shape == (32, 64)


def test_a_draft_vocabulary_is_kept_ascending_and_takes_no_id_twice() -> None:
    drafter = Hydra(TARGET.shape, 2, draft_vocabulary=4)
    drafter.set_vocabulary([9, 3, 120, 7])
    assert drafter.vocabulary_D is not None and drafter.vocabulary_D.tolist() == [3, 7, 9, 120]
    with pytest.raises(ValueError, match="1 ids twice"):
        drafter.set_vocabulary([1, 2, 3, 4, 4])


def test_mistakes_are_one_line() -> None:
    for build, words in (
        (lambda: Clover2(TARGET.shape, fusion="x"), "fusion must be one of attention, linear"),
        (lambda: Hydra(TARGET.shape, labels="x"), "labels must be one of soft, hard"),
        (lambda: Clover2(TARGET.shape, labels="hard", label_top_k=8), "labels is 'hard'"),
    ):
        with pytest.raises(ValueError, match=words):
            build()

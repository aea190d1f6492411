"""Every loss against a slow, obvious recomputation."""

from __future__ import annotations

from math import log

import pytest
import torch

from modules.contracts.batches import TextBatch
from modules.losses import chunked as losses
from tests.fakes import tiny_batch, tiny_target

STEPS = 3


@pytest.fixture
def batch() -> TextBatch:
    return tiny_batch(tiny_target("llama"))


def counts(batch: TextBatch, b: int, t: int, label: int) -> bool:
    """Whether x_label may be predicted from position t of row b."""
    documents = batch.document_ids[b]
    return (
        label < len(documents)
        and int(documents[t]) >= 0
        and bool(batch.loss_mask[b, label])
        and all(documents[i] == documents[t] for i in range(t, label + 1))
    )


def test_training_rows(batch: TextBatch) -> None:
    length = batch.input_ids.shape[1]
    expected = [(b, t) for b in range(2) for t in range(length) if counts(batch, b, t, t + 2)]
    rows = losses.training_rows(batch, STEPS)
    assert rows.flat_MK1[:, 0].tolist() == [b * length + t for b, t in expected]
    for m, (b, t) in enumerate(expected):
        for d in range(STEPS):
            assert bool(rows.valid_MK[m, d]) == counts(batch, b, t, t + 2 + d)
            if rows.valid_MK[m, d]:
                assert (
                    rows.tokens_MK1[m, d : d + 2].tolist()
                    == batch.input_ids[b, t + 1 + d : t + 3 + d].tolist()
                )
                assert int(rows.flat_MK1[m, d + 1]) == b * length + t + 1 + d


def test_next_token_rows(batch: TextBatch) -> None:
    length = batch.input_ids.shape[1]
    flat, labels = losses.next_token_rows(batch)
    expected = [(b, t) for b in range(2) for t in range(length) if counts(batch, b, t, t + 1)]
    assert flat.tolist() == [b * length + t for b, t in expected]
    assert labels.tolist() == [int(batch.input_ids[b, t + 1]) for b, t in expected]


def test_labels_outside_the_draft_vocabulary_are_ignored() -> None:
    vocabulary = torch.tensor([3, 5, 9])
    assert losses.draft_labels(torch.tensor([5, 4, 9, 11, 0, 3]), vocabulary).tolist() == [
        1,
        -1,
        2,
        -1,
        -1,
        0,
    ]


@pytest.mark.parametrize("chunk", [10**6, 40])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int, soft: bool) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS", chunk)
    torch.manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.float64)
    states = torch.randn(1, 30, 4, dtype=torch.float64)
    features = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    labels, flat = torch.randint(-1, 7, (20,)), torch.randint(0, 30, (20,))
    distributions = (
        losses.target_distributions(lambda hidden: hidden @ weight.T, states, flat, 7)
        if soft
        else None
    )
    found, ranks = losses.cross_entropy(
        features, lambda hidden: hidden @ weight.T, labels, 7, distributions, flat
    )
    found.sum().backward()
    total, again = torch.zeros((), dtype=torch.float64), features.detach().clone().requires_grad_()
    for m, label in enumerate(labels.tolist()):
        if label < 0:
            assert float(found[m]) == 0 and int(ranks[m]) == 7
            continue
        logits = weight @ again[m]
        probs = logits.exp() / logits.exp().sum()
        true = torch.eye(7, dtype=torch.float64)[label]
        if soft:
            true = (weight @ states[0, flat[m]]).exp() / (weight @ states[0, flat[m]]).exp().sum()
        own = -(true * probs.log()).sum()
        torch.testing.assert_close(found[m], own)
        assert int(ranks[m]) == sum(float(x) > float(logits[label]) for x in logits)
        total = total + own
    total.backward()
    torch.testing.assert_close(features.grad, again.grad)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_weighted_rows_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, learns: bool, soft: bool
) -> None:
    """Every row has a weight of its own, known only afterwards; a frozen head runs once per
    chunk.
    """
    torch.manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=learns)
    given = torch.randn(20, 4, dtype=torch.float64)
    labels, flat, rows = (
        torch.randint(-1, 7, (20,)),
        torch.randint(0, 20, (20,)),
        torch.randn(20, dtype=torch.float64),
    )
    probs = torch.rand(20, 7, dtype=torch.float64).softmax(-1)
    heads: list[int] = []

    def gradients(chunk: int) -> list[torch.Tensor]:
        def head(hidden: torch.Tensor) -> torch.Tensor:
            heads.append(len(hidden))
            return (hidden @ weight.T).tanh() * 3

        monkeypatch.setattr(losses, "MAX_LOGITS", chunk)

        features = given.clone().requires_grad_()
        found, _ = losses.cross_entropy(
            features, head, labels, 7, (lambda f: probs[f]) if soft else None, flat
        )
        heads.append(-1)
        (found * rows).square().sum().backward()
        assert features.grad is not None
        return [features.grad, *([weight.grad.clone()] if weight.grad is not None else [])]

    hidden = given.clone().requires_grad_()
    logits = (hidden @ weight.T).tanh() * 3
    true = probs[flat] if soft else torch.nn.functional.one_hot(labels.clamp(min=0), 7)
    plain = -(true * logits.log_softmax(-1)).sum(-1).where(labels >= 0, 0.0)
    expected = torch.autograd.grad(
        (plain * rows).square().sum(), [hidden, *([weight] if learns else [])]
    )
    for chunk in (10**6, 40, 1):
        weight.grad = None
        heads.clear()
        for one, other in zip(gradients(chunk), expected, strict=True):
            torch.testing.assert_close(one, other)
        forward, backward = heads[: heads.index(-1)], heads[heads.index(-1) + 1 :]
        assert sum(forward) == 20 and sum(backward) == (20 if learns and chunk < 140 else 0)


def test_no_rows_have_no_loss_and_a_gradient_of_nothing() -> None:
    weight, features = torch.randn(7, 4), torch.randn(0, 4, requires_grad=True)
    found, ranks = losses.cross_entropy(
        features, lambda hidden: hidden @ weight.T, torch.zeros(0).long(), 7
    )
    found.sum().backward()
    assert (
        found.shape == ranks.shape == (0,)
        and features.grad is not None
        and features.grad.shape == (0, 4)
    )


def test_smooth_l1_is_quadratic_near_and_linear_far() -> None:
    found = losses.smooth_l1(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    torch.testing.assert_close(found, torch.tensor([(0.5 * 0.25 + 2.5) / 2]))


def test_likely_tokens_and_entropies() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])

    def distributions(flat):
        return probs[flat]

    flat, labels = torch.zeros(4, dtype=torch.long), torch.arange(4)
    assert losses.likely_tokens(distributions, flat, labels, 4, top_k=3, top_p=1.0).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert losses.likely_tokens(distributions, flat, labels, 4, top_k=0, top_p=0.6).tolist() == [
        True,
        True,
        False,
        False,
    ]
    expected = -sum(p * log(p) for p in probs[0].tolist())
    torch.testing.assert_close(
        losses.entropies(distributions, flat[:1], 4), torch.tensor([expected])
    )


def test_means_weights_and_accuracy() -> None:
    assert (
        float(losses.masked_mean(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, True, False])))
        == 3
    )
    assert float(losses.masked_mean(torch.zeros(0), torch.zeros(0, dtype=torch.bool))) == 0
    assert losses.depth_weights(3, 0.5, 0.5) == [0.5, 0.25, 0.125]
    found = losses.accuracy(torch.tensor([0, 4, 5, 0]), torch.tensor([True, True, True, False]), 5)
    assert (int(found.total), int(found.count)) == (2, 3)

"""RASD: pruning by a drafter's distribution, fusion, and that it changes no token."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.drafters.retrieval.lookahead import Lookahead
from modules.drafters.retrieval.partner import as_trie
from modules.drafters.retrieval.rasd import (
    DraftDistributions,
    Rasd,
    RecordingDrafter,
    columns_of,
    matches,
    prune,
)
from modules.drafters.retrieval.suffix_array import Datastore
from modules.trees.named_trees import NARROW
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.branching import branching_tree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from modules.trees.trie import Trie
from tests.fakes import ScriptedDrafter, tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]


def partner() -> Drafter:
    torch.manual_seed(0)
    drafter = Medusa(TARGET.shape, heads=3)
    drafter.initialise(TARGET)
    return drafter.to(TARGET.dtype).eval()


def paths(tree, sequence: int = 0) -> set[tuple[int, ...]]:
    trie = as_trie(tree, sequence)
    return {tuple(trie.path(node)) for node in range(1, len(trie))}


def test_every_match_is_read() -> None:
    text = np.array([1, 2, 3, 1, 2, 4, 1, 2])
    assert matches(text, 3, length=3).tolist() == [[3, 1, 2], [4, 1, 2]]
    assert matches(text, 3, 2, length=3).size and not matches(text, 3, 3, length=3).size
    assert matches(np.array([5, 1, 5]), 3, length=3).tolist() == [[1, 5, -1]]
    assert not matches(np.array([1, 2]), 3, length=3).size and not matches(text, 0, length=3).size


def test_pruning() -> None:
    opinion = DraftDistributions(
        [9, 1], [-1, 0], torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.15, 0.05]])
    )
    found = [([2], 3), ([1], 2), ([0], 1), ([1, 0], 1), ([1, 2], 1), ([1, 0, 2], 1)]
    assert prune(found, opinion, 1, 1.0) == [[1], [1, 0], [1, 0, 2]]
    assert sorted(prune(found, opinion, 3, 0.0)) == sorted(path for path, _ in found)
    assert prune(found, None, 1, 1.0)[0] == [2] and len(prune(found, None, 1, 1.0)) == len(found)


def test_a_token_outside_the_draft_vocabulary_is_as_likely_as_the_text_has_such_tokens() -> None:
    """Tokens 5 and 6 are drafted; 2 of 8 tokens of the text are others, so 3 of 10 are expected to
    be. Behind such a token the drafter has no distribution."""
    columns = columns_of(torch.tensor([5, 6]), 10)
    drafter: Any = SimpleNamespace(vocabulary_D=torch.tensor([5, 6]))
    heard = RecordingDrafter(drafter)
    heard.tokens, heard.parents = [torch.tensor([[9, 5]])], [torch.tensor([[-1, 0]])]
    heard.distributions = [torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])]
    (opinion,) = heard.opinions([[5, 6, 5, 5, 7, 6, 6, 8]], 10)
    assert columns is not None and columns.tolist() == [-1] * 5 + [0, 1] + [-1] * 3
    assert opinion.outside == 0.3
    assert (
        opinion.path_probability([7], 1, 0.3) == 0.3
        and opinion.path_probability([7], 1, 0.31) is None
    )
    assert opinion.path_probability([7, 5, 5], 1, 0.3) == 0.3
    assert opinion.path_probability([5, 8, 6], 2, 0.0) == pytest.approx(0.9 * 0.7 * 0.3)
    assert opinion.path_probability([6], 2, 1.0) == pytest.approx(0.1 * 0.7)
    assert opinion.path_probability([6], 1, 0.08) is None
    # Ranked with the others, not above them; pruned with top 1 and least 1 as all but the argmax.
    found = [([7], 3), ([5], 3), ([6], 2)]
    assert prune(found, opinion, 2, 0.0) == [[5], [7], [6]]
    assert prune(found, opinion, 1, 1.0) == [[5]]


def test_text_is_asked_before_the_corpus_where_enough_of_its_end_stood_before(
    tmp_path: Path,
) -> None:
    """One token of the end stood before in the text, two stand in the corpus."""
    Datastore.build([[7, 8, 30]], TARGET.shape.vocab_size).save(tmp_path)
    text, other = [8, 20, 7, 8], [8, 20, 9, 8]
    for needed, expected in ((1, [20]), (2, [30]), (4, [30])):
        drafter = Rasd(TARGET.shape, datastore=str(tmp_path), text_match=needed)
        assert drafter.retrieve(text, 1) == [(expected, 1)]
        assert drafter.retrieve(other, 1) == [([20], 1)], "the corpus has nothing: the text again"
    assert Rasd(TARGET.shape).retrieve([1, 2], 1) == []
    with pytest.raises(ValueError, match=r"text_match must lie between 1 and longest \+ 1 \(4\)"):
        Rasd(TARGET.shape, text_match=5)


def test_what_is_ruled_out_makes_room_for_what_is_not() -> None:
    """Eight continuations begin with tokens that the partner rules out, and one with its own."""
    text = [t for first in range(60, 68) for t in (9, first, 70, 71)] + [9, 20, 21, 22, 23, 24, 9]
    scripted = Chain(TARGET.shape)
    drafter = Rasd(TARGET.shape, scripted, retrieved=4, tokens=6, top=1, least=1.0)
    ids, length = torch.tensor([text[:-1]]), torch.tensor([len(text) - 1])
    state = drafter.start(Context(TARGET, ids, length, torch.tensor(text[-1:])))
    assert max(paths(drafter.propose(state, 6)), key=len) == (20, 21, 22, 23, 24, 9)


class Chain(ScriptedDrafter):
    """Certain of token 20, and drafts it by a builder that asks for its distribution."""

    builder = StaticTree([[0]])
    propose = Drafter.propose

    def expand(self, state: DraftState, frontier: Frontier) -> torch.Tensor:
        logits = torch.zeros(*frontier.tokens_BW.shape, self.vocab)
        logits[..., 20] = 9.0
        return logits


def test_fusion_is_the_union_of_both_halves() -> None:
    text = torch.tensor([[7, 8, 9, 10, 7]])
    context = Context(TARGET, text, torch.tensor([5]), torch.tensor([8]), prompt_states(text))
    drafter = partner()
    alone = paths(StaticTree(NARROW).build(drafter, drafter.start(context), 7))
    fused = Rasd(TARGET.shape, drafter, top=128, least=0.0, retrieved=3, tokens=10)
    retrieval = Rasd(TARGET.shape, tokens=10)
    both, retrieved = (paths(one.propose(one.start(context), 10)) for one in (fused, retrieval))
    assert retrieved == {(9,), (9, 10), (9, 10, 7), (9, 10, 7, 8)}
    assert alone < both and len(both) == 10 and both - alone <= retrieved


def prompt_states(text: torch.Tensor) -> dict:
    drafter = partner()
    session = TARGET.open(1, 64)
    return session.prefill(text, torch.tensor([text.shape[1]]), drafter.decoding_states)[1]


def test_nothing_retrieved_is_the_partner_alone() -> None:
    text = torch.tensor([[7, 8, 9, 10]])
    context = Context(TARGET, text, torch.tensor([4]), torch.tensor([11]), prompt_states(text))
    drafter = partner()
    fused = Rasd(TARGET.shape, drafter, retrieved=3, tokens=10)
    assert paths(fused.propose(fused.start(context), 10)) == paths(
        drafter.propose(drafter.start(context), 7)
    )
    heard = RecordingDrafter(drafter)
    drafter.builder.build(heard, drafter.start(context), 7)  # type: ignore[arg-type]
    assert heard.opinions([[7, 8, 9, 10, 11]], 128)[0].probs_WD is not None


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["retrieval", "medusa", "script"])
def test_greedy_output_is_the_targets_own(name: str, count: int) -> None:
    with_partner = {
        "retrieval": None,
        "medusa": partner(),
        "script": ScriptedDrafter(TARGET.shape, 0.6, decoys=1),
    }
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS[:count], Sampling(), 30)
    drafter = Rasd(TARGET.shape, with_partner[name], tokens=12)
    drafted = SpeculativeDecoder(TARGET, drafter).decode(PROMPTS[:count], Sampling(), 30)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]
    if name == "script":
        assert len(drafted[0].accepted) < len(plain[0].accepted)


@pytest.mark.parametrize(
    ("partner_of", "builder", "words"),
    [
        (
            partner,
            branching_tree([2, 2]),
            r"DrawnTree draws its siblings \(without_replacement\).* verified by value",
        ),
        (partner, SampledChain(2), r"rasd: SampledChain draws its siblings"),
        (partner, RerankedTree(depth=4), "depth 4, but the drafter has 3 heads: lower the depth"),
        (
            lambda: Lookahead(TARGET.shape),
            None,
            "rasd: partner Lookahead needs rows that only compute",
        ),
        (
            lambda: Lookahead(TARGET.shape),
            RerankedTree(depth=2),
            "rasd: partner Lookahead needs rows that only compute",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(partner_of, builder, words: str) -> None:
    """Mixed nodes among them: siblings that were drawn would need the ratio rule beside the point
    rule.
    """
    with pytest.raises(ValueError, match=words):
        Rasd(TARGET.shape, partner_of(), builder=builder, tokens=40)
    assert (
        Rasd(TARGET.shape, partner(), builder=RerankedTree(depth=3)).sibling_draw
        is SiblingDraw.BY_VALUE
    )


def right_depth(trie: Trie, future: list[int]) -> int:
    """How many tokens of the target's own text a tree holds in a row."""
    node, depth = 0, 0
    while depth < len(future) and (found := trie.child(node, future[depth])) is not None:
        node, depth = found, depth + 1
    return depth


class HalfRight(ScriptedDrafter):
    """A chain of `future`, about half of it spoiled."""

    future: list[int]

    def _future(self, target, ids: list[int]) -> list[int]:
        spoilt = torch.rand(self.depth, generator=self.coin) < 0.5
        return [token + 50 * wrong for token, wrong in zip(self.future, spoilt.tolist())]


def test_a_fused_tree_accepts_at_least_what_either_part_accepts() -> None:
    """Step by step over a text that half repeats itself, with the budget of both parts; each is
    ahead at some step.
    """
    draw = random.Random(0)
    ids = [draw.choice(range(10, 14)) for _ in range(80)]
    scripted = HalfRight(TARGET.shape, depth=3)
    fused, retrieval = (Rasd(TARGET.shape, one, retrieved=4, tokens=7) for one in (scripted, None))
    leads = set()
    for end in range(3, len(ids) - 8):
        text, scripted.future, reached = torch.tensor([ids[:end]]), ids[end:], []
        context = Context(TARGET, text[:, :-1], torch.tensor([end - 1]), text[:, -1])
        for drafter, budget in ((scripted, 3), (retrieval, 4), (fused, 7)):
            scripted.coin.manual_seed(end)
            reached.append(
                right_depth(as_trie(drafter.propose(drafter.start(context), budget), 0), ids[end:])
            )
        assert reached[2] >= max(reached[:2])
        leads.add((reached[0] > reached[1]) - (reached[0] < reached[1]))
    assert {-1, 1} <= leads

"""A drafter with a tokenizer of its own: other ids, pieces that the target has not, and none for
some that it has. The drafter takes no line outside of this file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.translation import TranslatedDrafter, in_target_ids
from modules.losses.chunked import masked_mean
from modules.target.tokenizers.vocabulary import VocabularyMap, check_tokenizer, first_difference
from modules.trees.sampled.branching import DrawnTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import tiny_target, tiny_tokenizer
from tests.modules.conformance import check_decoding, check_gradients, check_loss, check_no_labels
from tests.modules.sampling import goodness, small_target


def other_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Three of four pieces of the target's in reverse order, between pieces of its own."""
    pieces = [piece for i, piece in enumerate(pieces_of(tiny_tokenizer(size))) if i % 4 != 3]
    half = len(pieces) // 2
    mixed = ["other 0", *reversed(pieces[half:]), "other 1", *reversed(pieces[:half])]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(mixed)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def pieces_of(tokenizer: Any) -> list[str]:
    """Its pieces by id."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


class Bigram(Drafter):
    """The next token's logits by the newest token, both in ids of its own tokenizer."""

    builder = StaticTree.chain(3)

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()
        self.draft_tokenizer = other_tokenizer(shape.vocab_size)
        size = len(self.draft_tokenizer)
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.manual_seed(3)))

    def compatibility(self, target: Any) -> str | None:
        return None

    def start(self, context: Context) -> DraftState:
        return DraftState(context, context.newest_B, context.lengths_B)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        return self.table[frontier.tokens_BW]

    def loss(self, batch: TextBatch, target: Any, progress: float) -> Losses:
        ids = VocabularyMap.between(self.draft_tokenizer, target).to_draft(batch.input_ids)
        losses = F.cross_entropy(self.table[ids[:, :-1]].mT, ids[:, 1:], reduction="none")
        return Losses(masked_mean(losses.flatten(), batch.loss_mask[:, 1:].flatten()))


def bigram(target: Any) -> Bigram:
    return Bigram(target.shape).double().eval()


def test_it_passes_what_conformance_checks() -> None:
    target = tiny_target()
    check_decoding(bigram)
    for check in (check_loss, check_gradients, check_no_labels):
        check(bigram(target), target)


@pytest.mark.parametrize(
    "builder",
    [SampledChain(2), DrawnTree([(0,), (1,), (0, 0)]), DrawnTree([(0,), (1,)], "independent")],
    ids=["chain", "without replacement", "independent"],
)
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)], ids=["1", "warped"])
def test_drawn_trees_keep_the_targets_distribution(builder: Any, sampling: Sampling) -> None:
    target = small_target()
    decoder = SpeculativeDecoder(target, bigram(target), builder=builder, stop_ids=frozenset())
    assert goodness(decoder, [3, 1], sampling, runs=1500) > 1e-4


def test_tables_map_pieces_of_the_same_spelling_and_no_others() -> None:
    target = small_target()
    ours, theirs = pieces_of(target.tokenizer), pieces_of(other_tokenizer(6))
    vocabulary = VocabularyMap.between(other_tokenizer(6), target)
    to_target, to_draft = vocabulary.draft_to_target_E, vocabulary.target_to_draft_V
    assert to_target.dtype == to_draft.dtype == torch.int64
    expected = [ours.index(piece) if piece in ours else -1 for piece in theirs]
    assert to_target.tolist() == expected and -1 in expected and -1 in to_draft
    assert [theirs[i] for i in to_draft.tolist() if i >= 0] == [p for p in ours if p in theirs]
    unknown = theirs.index("<unk>")
    assert vocabulary.to_draft(torch.tensor([[3, 5]])).tolist() == [[unknown, theirs.index("a")]]
    columns_D, targets_D = vocabulary.columns(None)
    assert targets_D.tolist() == sorted(targets_D.tolist()) == [0, 1, 2, 4, 5]
    assert [theirs[i] for i in columns_D.tolist()] == [ours[i] for i in targets_D.tolist()]
    trimmed = torch.tensor([0, theirs.index("a"), theirs.index("<|end|>")])
    assert [part.tolist() for part in vocabulary.columns(trimmed)] == [[2, 1], [0, 5]]


def test_ids_of_two_pieces_are_mapped_once_and_none_beyond_the_model() -> None:
    target, tokenizer = small_target(), other_tokenizer(6)
    found = tokenizer.get_vocab()
    target.tokenizer.get_vocab = lambda: {"a": 5, "other 0": 5, "<unk>": 6, "other 1": 2}
    vocabulary = VocabularyMap.between(tokenizer, target)
    expected = {5: found["a"], 2: found["other 1"]}
    assert vocabulary.target_to_draft_V.tolist() == [expected.get(i, -1) for i in range(6)]
    assert int((vocabulary.draft_to_target_E >= 0).sum()) == 2


class Recorder(Bigram):
    """Remembers what it is given."""

    def start(self, context: Context) -> DraftState:
        self.context = context
        return super().start(context)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        self.frontier = frontier
        return super().expand(state, frontier)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        self.prepared = tree.tokens_BN
        return replace(tree, candidate_BN=torch.ones_like(tree.tokens_BN, dtype=torch.bool))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        self.read = accepted.emitted(verified.tree)
        return super().absorb(state, verified, accepted)


def test_a_drafter_reads_and_writes_its_own_ids() -> None:
    target = small_target()
    recorder = Recorder(target.shape)
    drafter = in_target_ids(recorder, target)
    to_draft = VocabularyMap.between(recorder.draft_tokenizer, target).to_draft
    prompt_B2, newest_B, lengths_B = torch.tensor([[1, 3]]), torch.tensor([5]), torch.tensor([2])
    generators = (torch.Generator(),)
    state = drafter.start(Context(target, prompt_B2, lengths_B, newest_B, generators=generators))
    assert torch.equal(recorder.context.input_ids_BT, to_draft(prompt_B2))
    assert torch.equal(recorder.context.newest_B, to_draft(newest_B))
    assert state.newest_B is newest_B and state.context.input_ids_BT is prompt_B2
    logits = drafter.expand(state, Frontier(torch.tensor([[2]]), torch.tensor([[-1]]), 0))
    assert recorder.frontier.tokens_BW.tolist() == to_draft(torch.tensor([[2]])).tolist()
    columns_D = to_draft(torch.tensor([0, 1, 2, 4, 5]))
    assert torch.equal(logits[0, 0], recorder.table[to_draft(torch.tensor(2)), columns_D])
    tree = TokenTree.chain(torch.tensor([[5, 2, 1]]))
    prepared = drafter.prepare(state, tree)
    assert torch.equal(recorder.prepared, to_draft(tree.tokens_BN))
    assert prepared.tokens_BN is tree.tokens_BN and prepared.candidate_BN is not None
    accepted = Accepted(torch.tensor([[0, 1]]), torch.tensor([2]), torch.tensor([4]))
    after = drafter.absorb(state, Verified(tree, torch.zeros(1, 3, 6)), accepted)
    assert torch.equal(recorder.read, to_draft(torch.tensor([[2, 4]])))
    assert after.newest_B.tolist() == [4] and after.lengths_B.tolist() == [4]
    both = after.select(torch.tensor([0, 0]))
    assert both.newest_B.tolist() == [4, 4]


def test_what_cannot_be_translated_is_refused() -> None:
    class OwnTrees(Bigram):
        def propose(self, state: DraftState, budget: int) -> TokenTree:
            return TokenTree.root(state.newest_B)

    target = small_target()
    with pytest.raises(ValueError, match="proposes its own trees: implement `expand`"):
        SpeculativeDecoder(target, OwnTrees(target.shape))
    foreign = bigram(target)
    foreign.draft_tokenizer.get_vocab = lambda: {"other": 0}
    with pytest.raises(ValueError, match="has no token of the target tiny-llama"):
        SpeculativeDecoder(target, foreign)


def test_a_drafter_without_a_tokenizer_is_itself() -> None:
    target = small_target()
    plain = bigram(target)
    plain.draft_tokenizer = None
    assert in_target_ids(plain, target) is plain
    translated = in_target_ids(bigram(target), target)
    assert isinstance(translated, TranslatedDrafter) and translated.draft_tokenizer is None


def test_tokenizers_are_compared_by_pieces_and_ids() -> None:
    target = small_target()
    assert first_difference(tiny_tokenizer(6), target) is None
    check_tokenizer(tiny_tokenizer(6), "model 'x'", target)
    with pytest.raises(ValueError, match=r"model 'x' has another.*'<unk>' is 2 there and 4 here"):
        check_tokenizer(other_tokenizer(6), "model 'x'", target)

"""Trained prompt embeddings behind every node guess the tokens after the next one. The drafter
takes no line outside of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import AuxiliaryRows
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.losses.chunked import masked_mean
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.conformance import check_decoding, check_gradients, check_loss, check_no_labels
from tests.modules.sampling import goodness, small_target

GUESSES = 2


@dataclass
class GuessState(DraftState):
    """What the prompt rows behind the newest token say, a final state [B,K,H] for each guess."""

    final_BKH: Tensor


class PromptTokens(Drafter):
    """Each row has `GUESSES` prompt rows behind it, which see what it sees, it and each other."""

    builder = StaticTree.chain(GUESSES)
    decoding_states = ("final",)
    max_depth = GUESSES
    online = True

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()
        self.prompts_KH = nn.Parameter(torch.randn(GUESSES, shape.hidden_size))

    def compatibility(self, target: Any) -> str | None:
        return None

    def behind(self, positions_BN: Tensor, visible_BNN: Tensor) -> AuxiliaryRows:
        """Prompt rows n * K … n * K + K - 1 of every row n."""
        batch, count = positions_BN.shape
        ahead = 1 + torch.arange(GUESSES)
        positions = (positions_BN[..., None] + ahead).flatten(1)
        seen = visible_BNN.expand(batch, -1, -1).repeat_interleave(GUESSES, 1)
        block = torch.ones(GUESSES, GUESSES, dtype=torch.bool).tril()
        others = torch.block_diag(*[block] * count).bool().expand(batch, -1, -1)
        inputs = self.prompts_KH.repeat(count, 1).expand(batch, -1, -1)
        return AuxiliaryRows(inputs, positions, torch.cat([seen, others], 2))

    def loss(self, batch: TextBatch, target: Any, progress: float) -> Losses:
        length, text = batch.input_ids.shape[1], batch.rows()
        auxiliary = self.behind(text.position_ids_BN, text.visible_BNJ)
        states = target.features(batch, ("final",), gradient=True, auxiliary=auxiliary)["final"]
        logits = target.logits(states[:, length:].unflatten(1, (length, GUESSES)))
        total, count = [], []
        for k in range(GUESSES):
            labels = batch.input_ids[:, k + 2 :]
            same = batch.document_ids[:, k + 2 :] == batch.document_ids[:, : -k - 2]
            losses = F.cross_entropy(logits[:, : -k - 2, k].mT, labels, reduction="none")
            total.append(losses.flatten())
            count.append((batch.loss_mask[:, k + 2 :] & same).flatten())
        return Losses(masked_mean(torch.cat(total), torch.cat(count)))

    def start(self, context: Context) -> GuessState:
        nothing = self.prompts_KH.new_zeros(len(context.newest_B), *self.prompts_KH.shape)
        return GuessState(context, context.newest_B, context.lengths_B, nothing)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        assert isinstance(state, GuessState)
        logits_BV = state.context.target.logits(state.final_BKH[:, frontier.depth])
        return logits_BV[:, None].expand(-1, frontier.tokens_BW.shape[1], -1)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        rows = tree.rows(state.lengths_B)
        return replace(tree, auxiliary=self.behind(rows.position_ids_BN, rows.visible_BNJ))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> GuessState:
        guesses = verified.auxiliary_states["final"].unflatten(1, (-1, GUESSES))
        final = guesses[torch.arange(len(guesses)), accepted.last_B].to(self.prompts_KH.dtype)
        state = super().absorb(state, verified, accepted)
        assert isinstance(state, GuessState)
        return replace(state, final_BKH=final)


def prompt_tokens(target: Any) -> PromptTokens:
    torch.manual_seed(3)
    return PromptTokens(target.shape).double().eval()


def test_it_passes_what_conformance_checks() -> None:
    target = tiny_target()
    check_decoding(prompt_tokens)
    for check in (check_loss, check_gradients, check_no_labels):
        check(prompt_tokens(target), target)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)], ids=["1", "warped"])
def test_drawn_trees_keep_the_targets_distribution(sampling: Sampling) -> None:
    target = small_target()
    drafter = prompt_tokens(target)
    builder = DrawnTree([(0,), (1,), (0, 0)])
    decoder = SpeculativeDecoder(target, drafter, builder=builder, stop_ids=frozenset())
    assert goodness(decoder, [3, 1], sampling, runs=1500) > 1e-4


def test_guesses_are_those_of_the_whole_text_with_prompt_rows_behind_it() -> None:
    """After every call, whatever was accepted, as one pass without a KV cache gives them."""
    target = tiny_target()
    drafter, prompt = prompt_tokens(target), [7, 8, 9, 10]
    seen: list[tuple[int, Tensor]] = []
    absorb = drafter.absorb

    def record(state: DraftState, verified: Verified, accepted: Accepted) -> GuessState:
        after = absorb(state, verified, accepted)
        seen.append((int(after.lengths_B), after.final_BKH[0]))
        return after

    drafter.absorb = record  # type: ignore[method-assign]
    ids = SpeculativeDecoder(target, drafter).decode([prompt], Sampling(), 12)[0].ids
    assert len(seen) > 3
    for length, guesses in seen[:-1]:
        text = torch.tensor([[*prompt, *ids][:length]])
        ones = torch.ones(1, length, dtype=torch.bool)
        batch = TextBatch(text, ones, torch.arange(length)[None], torch.zeros_like(text))
        auxiliary = drafter.behind(batch.rows().position_ids_BN, batch.rows().visible_BNJ)
        states = target.features(batch, ("final",), auxiliary=auxiliary)["final"]
        torch.testing.assert_close(guesses, states[0, -GUESSES:])

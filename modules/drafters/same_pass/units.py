"""Lexical units in a text, and repetitions in drafts (LUD, Sun et al. 2024, arXiv 2405.15208).

Shape legend: B sequences, T tokens of a packed row, N nodes, X recent tokens, M label tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.token_tree import TokenTree
from modules.drafters.trained import final_states
from modules.losses.chunked import cross_entropy, next_token_rows

if TYPE_CHECKING:
    from modules.contracts.target import Target


@torch.no_grad()
def confident_tokens(batch: TextBatch, target: Target, confidence: float) -> tuple[Tensor, Tensor]:
    """bool [B,T] each: which tokens are labels, and which of them the target gives at least this
    probability after the tokens before.
    """
    flat_M, labels_M = next_token_rows(batch)
    states_MH = final_states(batch, target).flatten(0, 1)[flat_M]
    size = target.shape.vocab_size
    losses_M, _ = cross_entropy(states_MH, target.unrounded_logits, labels_M, size)
    labels = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=flat_M.device)
    confident = torch.zeros_like(labels)
    # The state at a position is about the token after it.
    labels[flat_M + 1], confident[flat_M + 1] = True, (-losses_M).exp() >= confidence
    return labels.view_as(batch.input_ids), confident.view_as(batch.input_ids)


def unit_lengths(labels_BT: Tensor, confident_BT: Tensor, longest: int) -> Tensor:
    """int64 [B,T]: tokens of the unit that begins at each position, 0 where none does.

    Every label token is in one unit. A token that is not confident begins one, and so does one
    whose predecessor is no label. Confident tokens continue it, up to `longest` tokens in all; the
    next one then begins another.
    """
    index_T = torch.arange(labels_BT.shape[1], device=labels_BT.device)
    # 1. Where runs begin, and each token's place in its unit.
    before_BT = labels_BT.roll(1, 1)
    before_BT[:, 0] = False
    breaks_BT = ~(labels_BT & confident_BT & before_BT)
    run_BT = torch.where(breaks_BT, index_T, -1).cummax(1).values
    begins_BT = labels_BT & ((index_T - run_BT) % longest == 0)
    # 2. A unit ends where the next begins, or at a token that is no label.
    count = len(index_T)
    ends_BT = torch.where(begins_BT | ~labels_BT, index_T, count).roll(-1, 1)
    ends_BT[:, -1] = count
    next_BT = ends_BT.flip(1).cummin(1).values.flip(1)
    return (next_BT - index_T) * begins_BT


def repeating_nodes(tree: TokenTree, recent_BX: Tensor, longest: int) -> Tensor:
    """bool [B,N]: drafted nodes at which the same 1 … `longest` tokens stand twice in a row.

    Args:
        tree: its paths continue the text.
        recent_BX: the last X = 2 · `longest` tokens before node 0, different negative numbers where
            there are none.
        longest: of the repeated tokens.
    """
    depth_BN, recent = tree.topology.depth, recent_BX.shape[1]
    index_BN = torch.arange(tree.size, device=recent_BX.device).expand_as(tree.tokens_BN)
    # 1. The last tokens of each path, the node's own first.
    path: list[Tensor] = []
    for above in range(recent):
        tokens_BN = tree.tokens_BN.gather(1, index_BN.clamp(min=0))
        earlier_BN = (recent - above + depth_BN).clamp(0, recent - 1)
        path.append(torch.where(index_BN < 0, recent_BX.gather(1, earlier_BN), tokens_BN))
        parents_BN = tree.parents_BN.expand_as(index_BN).gather(1, index_BN.clamp(min=0))
        index_BN = torch.where(index_BN < 0, -1, parents_BN)
    # 2. Compare the last tokens with as many before them.
    repeated_BN = torch.zeros_like(tree.acceptable_BN)
    for size in range(1, longest + 1):
        newest, earlier = torch.stack(path[:size]), torch.stack(path[size : 2 * size])
        repeated_BN = repeated_BN | (newest == earlier).all(0)
    return repeated_BN & tree.acceptable_BN & (depth_BN > 0)

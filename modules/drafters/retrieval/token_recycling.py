"""Token Recycling: the target's own recent predictions after every token, drafted as a tree (Luo et
al. 2024, arXiv 2408.08696).

Shape legend: B sequences, T prompt tokens, N nodes, K successors stored per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.contracts.drafter import Context, DraftState
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import TokenTree, packed
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import TextDrafter, TextState
from modules.trees.expected_length import path_probability
from modules.trees.named_trees import Path
from modules.trees.static import template

_CHILDREN = {
    "": 8,
    "0": 8,
    "1": 4,
    "2": 3,
    "3": 2,
    "4": 1,
    "5": 1,
    "6": 1,
    "7": 1,
    "00": 8,
    "01": 3,
    "02": 2,
    "03": 1,
    "04": 1,
    "05": 1,
    "06": 1,
    "07": 1,
    "10": 2,
    "11": 1,
    "20": 1,
    "30": 1,
    "40": 1,
    "50": 1,
    "000": 5,
    "001": 2,
    "002": 1,
    "003": 1,
    "004": 1,
    "010": 1,
    "020": 1,
    "100": 1,
    "200": 1,
    "300": 1,
    "0000": 3,
    "0001": 1,
    "0002": 1,
    "0010": 1,
    "0100": 1,
    "1000": 1,
    "00000": 2,
    "00010": 1,
}
"""The released template: how many of a node's successors are drafted, a node as a string of
ranks.
"""
TEMPLATE: list[Path] = [
    [*map(int, node), rank] for node, count in _CHILDREN.items() for rank in range(count)
]
RANKS = (0.5, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.01)
"""Assumed acceptance of a token's successors by rank: a smaller budget takes the template's nodes
of highest product.
"""
UNKNOWN = -1
"""Successor of a token that was never read; it is not drafted. (The release drafts token 0 for
every child of the template there.)"""


class TokenRecycling(TextDrafter):
    """Stores, for every token, the K most likely successors of the target's latest prediction after
    it, and drafts a fixed tree through them. Every verified node is recycled, accepted or not.

    The table stays from prompt to prompt (hot start) and is saved with the drafter; `forget` clears
    it.

    Args:
        shape: the target's dimensions.
        successors: K.
        tokens: nodes drafted, unless a method's budget says otherwise (the paper: 80); a smaller
            tree has the most valuable nodes of the paper's.
        recycle_prompt: also recycle the target's predictions along the prompt (this runs its LM
            head there).
        cold: begin every batch of prompts with an empty table.
    """

    successors_VK: Tensor

    def __init__(
        self,
        shape: TargetShape,
        successors: int = 8,
        tokens: int = 7,
        recycle_prompt: bool = False,
        cold: bool = False,
    ) -> None:
        super().__init__(shape)
        most = min(8, shape.vocab_size)
        if not 1 <= successors <= most:
            raise ValueError(f"successors must lie between 1 and {most}, got {successors}")
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.successors, self.tokens = successors, tokens
        self.recycle_prompt, self.cold = recycle_prompt, cold
        # Paths by their assumed probability, so that a budget takes a prefix of the list.
        paths = [path for path in TEMPLATE if max(path) < successors]
        self.paths: Sequence[Path] = sorted(
            paths, key=lambda path: -path_probability(path, [RANKS] * 6)
        )
        unknown_VK = torch.full((shape.vocab_size, successors), UNKNOWN, dtype=torch.int32)
        self.register_buffer("successors_VK", unknown_VK)

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    @property
    def learns(self) -> bool:
        """Whether the table carries over between prompts."""
        return not self.cold

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The final states, if the prompt is recycled."""
        return ("final",) if self.recycle_prompt else ()

    def forget(self) -> None:
        """Clear the table: no token has a known successor."""
        self.successors_VK.fill_(UNKNOWN)

    def start(self, context: Context) -> TextState:
        """State with the text; clears the table if `cold`, recycles the prompt if configured."""
        if self.cold:
            self.forget()
        # The target's predictions along the prompt, 64 rows of logits at a time.
        if self.recycle_prompt:
            inside = torch.arange(context.input_ids_BT.shape[1], device=context.lengths_B.device)
            read_BT = inside < context.lengths_B[:, None]
            for states_MH, tokens_M in zip(
                context.states["final"][read_BT].split(64),
                context.input_ids_BT[read_BT].split(64),
                strict=True,
            ):
                self.recycle(tokens_M, context.target.logits(states_MH))
        return super().start(context)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The first `budget` paths of the template, filled from the table: one gather per level.

        Unknown tokens are left out. A token's successors are distinct, so siblings are too.
        """
        fixed = template(tuple(tuple(path) for path in self.paths[:budget]), state.newest_B.device)
        tokens_BN = state.newest_B[:, None]
        for level in fixed.levels:
            known_BWK = self.successors_VK[tokens_BN[:, level.nodes]]
            tokens_BN = torch.cat(
                [tokens_BN, known_BWK[:, level.sources, level.ranks].long()], dim=1
            )
        topology, known_BN = fixed.topology.expand(len(tokens_BN)), tokens_BN >= 0
        if bool(known_BN.all()):
            return TokenTree(tokens_BN, topology)
        # Nodes below an unknown token are invalid.
        drafted_BN = ~(topology.ancestors & ~known_BN[:, None]).any(-1)
        return packed(tokens_BN.clamp(min=0), topology.parents_BN, drafted_BN)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> TextState:
        """Recycle the logits of every verified node."""
        real_BN = ~verified.tree.topology.padding.expand_as(verified.tree.tokens_BN)
        self.recycle(verified.tree.tokens_BN[real_BN], verified.logits_BNV[real_BN])
        return super().absorb(state, verified, accepted)

    def recycle(self, tokens_M: Tensor, logits_MV: Tensor) -> None:
        """Store the K most likely successors of each token; of several rows of a token, the last
        counts.
        """
        later_MM = (tokens_M[:, None] == tokens_M).triu(1)
        last_M = ~later_MM.any(1)
        best_MK = logits_MV[last_M].topk(self.successors, dim=-1).indices
        self.successors_VK[tokens_M[last_M]] = best_MK.to(self.successors_VK.dtype)

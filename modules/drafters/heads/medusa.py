"""Medusa: independent heads on the target's last hidden state (Cai et al. 2024, arXiv 2401.10774).

Shape legend: B sequences, W frontier nodes, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from torch import Tensor, nn

from modules.contracts.drafter import DraftState, Frontier
from modules.contracts.shapes import TargetShape
from modules.drafters.heads.base import HeadDrafter, HeadState
from modules.layers.decoder_layer import ResBlock
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Medusa(HeadDrafter):
    """Medusa-1: K heads of residual blocks and an LM head each, trained on a frozen target.

    At initialisation the residual blocks add only SiLU(bias), so every head repeats the target's
    own prediction.

    Args:
        shape: the target's dimensions.
        heads: K.
        blocks: residual blocks per head.
        lm_head: `"own"` (the paper's: a trainable copy per head) or `"shared"` (the target's,
            frozen).
        draft_vocabulary: how many token ids can be drafted; None for all.
        tree: paths, or a name of `modules.trees.named_trees`; None is `narrow`, on a GPU
            `mc_sim_7b_63`.
        decay: head k weighs decay^(k+1).
        divergence: learn the target's distribution by it (`modules.losses.divergences`) instead of
            the tokens of the data; null: those.
    """

    stored_bytes: ClassVar[tuple[float, float, float]] = (10.0, 7.0, 6.0)

    def __init__(
        self,
        shape: TargetShape,
        heads: int = 5,
        blocks: int = 1,
        lm_head: Literal["own", "shared"] = "own",
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str | None = None,
        decay: float = 0.8,
        divergence: str | None = None,
    ) -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        self.use_divergence(divergence, learns=True)
        if lm_head not in ("own", "shared"):
            raise ValueError(f"lm_head must be 'own' or 'shared', got {lm_head!r}")
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(shape.hidden_size) for _ in range(blocks)))
            for _ in range(heads)
        )
        if lm_head == "own":
            self.use_own_lm_heads(bias=False)
        self.use_tree(cast(list[Path] | str | None, tree))

    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """The head's residual blocks applied to the target's state; drafted tokens are ignored."""
        return self.blocks[depth](memory_NX)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D]; all nodes of a depth share them, so they are computed once."""
        assert isinstance(state, HeadState)
        target = state.context.target
        feature = self.feature(frontier.depth, state.start_BX[:, None], frontier.tokens_BW, target)
        logits_B1D = self.head(frontier.depth, target)(feature)
        return logits_B1D.expand(-1, frontier.tokens_BW.shape[1], -1)

"""What the head families share: LM heads, the teacher-forced loop over depths, draft states.

A head drafter reads one target state per position, turns it into a start (at the newest position
once per proposal), and takes one step per draft depth: step d reads token x_{t+1+d} and drafts
x_{t+2+d}.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, W frontier nodes, R rows of
a proposal, M training rows, K heads, H hidden size, X size of a step's memory, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.rows import Rows, causal_rows, rows_at
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.verification import Accepted, Verified
from modules.drafters.trained import WIDE_TREE, TrainedDrafter
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import DecoderLayer, LayerCache, run_layers
from modules.losses.chunked import Head, LearntHead, TrainingRows
from modules.trees.named_trees import Path, tree_paths
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class HeadState(DraftState):
    """A head drafter's knowledge of its sequences.

    start_BX: the start of a proposal, at the last position that the target has read.
    caches: keys and values of the drafter's own layers, one cache per layer.
    rows_BRX: the memory of each row handed to `expand` in this proposal.
    """

    start_BX: Tensor
    caches: list[LayerCache]
    rows_BRX: Tensor | None = None


class SteppedHeads(TrainedDrafter):
    """K heads with an LM head each, one per drafted token, and the trees that they draft; how a
    head's input is made is the subclass's.

    Args:
        shape: the target's dimensions.
        heads: K, how many tokens are drafted in a row.
        draft_vocabulary: D, how many token ids can be drafted; None, or as many as the target has,
            means all of them.
        decay: loss weight of step d, `decay ** (d + first_exponent)`.
    """

    depth_unit = "heads"

    def __init__(
        self, shape: TargetShape, heads: int, draft_vocabulary: int | None, decay: float
    ) -> None:
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        super().__init__(shape, heads, draft_vocabulary, decay)
        self.heads = heads
        self.lm_heads = nn.ModuleList()

    def use_tree(self, tree: list[Path] | str | None) -> None:
        """Draft fixed paths; None: `narrow`, or on a GPU those of Medusa's released tree whose
        ranks the draft vocabulary has."""
        self.use_static_tree("narrow" if tree is None else tree)
        if tree is None:
            paths = tree_paths(WIDE_TREE, self.max_depth)
            wide = StaticTree([path for path in paths if max(path) < self.draft_size])
            self._wide = (wide, len(wide.paths))

    # -- LM heads ------------------------------------------------------------------------

    def use_own_lm_heads(self, bias: bool, states: int = 1) -> None:
        """Create one trainable LM head per step, over so many states side by side; `initialise`
        copies the target's into each, once per state.
        """
        inputs = states * self.shape.hidden_size
        self.lm_heads = nn.ModuleList(
            LearntHead(inputs, self.draft_size, bias) for _ in range(self.heads)
        )

    def head(self, depth: int, target: Target) -> Head:
        """Features [..., H] of step `depth` -> logits [..., D], by the step's trainable LM head or
        the target's frozen one.
        """
        if not self.lm_heads:
            return lambda hidden: target.logits(hidden, self.vocabulary_D, self.precision)
        return self.lm_heads[depth]

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the target's LM head into the trainable ones."""
        # Every step's LM head starts as the target's rows of the draft vocabulary, without bias.
        every = torch.arange(self.shape.vocab_size, device=target.device)
        for lm_head in self.lm_heads:
            rows = target.lm_head_rows(
                every if self.vocabulary_D is None else self.vocabulary_D.to(target.device)
            )
            weight = cast(nn.Linear, lm_head).weight
            weight.copy_(rows.repeat(1, weight.shape[1] // rows.shape[1]))
            if lm_head.bias is not None:
                nn.init.zeros_(cast(Tensor, lm_head.bias))

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The state it starts from."""
        return (self.reads,)

    @property
    def max_depth(self) -> int:
        """One level per head."""
        return self.heads


class HeadDrafter(SteppedHeads):
    """Base of the head families whose steps read nothing but memory and token.

    Subclasses define `step` and `feature`, and override `begin` when their start is more than the
    target's state.

    Args:
        shape, heads, draft_vocabulary, decay: as in `SteppedHeads`.
    """

    def __init__(
        self, shape: TargetShape, heads: int, draft_vocabulary: int | None, decay: float
    ) -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        self.layers = nn.ModuleList()

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Also start the layers (`start_layers`)."""
        self.start_layers(target)
        super().initialise(target)

    def start_layers(self, target: Target) -> None:
        """Copy the target's last layer into the drafter's layers of the same type."""
        for layer in self.layers:
            cast(DecoderLayer, layer).copy_from(target)

    # -- what makes a family -----------------------------------------------------------------------

    def begin(
        self,
        hidden_BNH: Tensor,
        next_BN: Tensor,
        target: Target,
        rows: Rows,
        caches: list[LayerCache] | None,
    ) -> Tensor:
        """Starts [B,N,X] from the target's states at consecutive positions and the tokens that
        follow them.
        """
        return hidden_BNH

    def step(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """Memory [..., X] after step `depth` has read token x_{t+1+depth} [...]."""
        return memory_NX

    @abstractmethod
    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """What the LM head of step `depth` reads [..., H]."""

    # -- training ----------------------------------------------------------------------------------

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM heads' inputs [M,H], step by step, given the data's own tokens."""
        following = batch.input_ids.roll(-1, 1)
        starts = self.begin(batch.states[self.reads], following, target, batch.rows(), None)
        memory = rows.take(starts)
        for depth in range(self.heads):
            tokens = rows.tokens_MK1[:, depth]
            memory = recomputed(self.recompute, self.step, depth, memory, tokens, target)
            yield recomputed(self.recompute, self.feature, depth, memory, tokens, target)

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> HeadState:
        """State after the prompts, from the target's states of them."""
        hidden = context.states[self.reads]
        caches = [
            LayerCache.empty(self.shape, context.lengths_B, self.precision) for _ in self.layers
        ]
        following, lengths_B = context.following_BT, context.lengths_B
        starts = self._read(hidden, following, lengths_B, context.target, caches)
        return HeadState(context, context.newest_B, context.lengths_B, starts, caches)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> HeadState:
        """State after the accepted rows, which may come from any tree."""
        assert isinstance(state, HeadState)
        hidden = accepted.along_path(verified.states[self.reads])
        starts = self._read(
            hidden,
            accepted.emitted(verified.tree),
            accepted.lengths_B,
            state.context.target,
            state.caches,
            accepted.lengths,
        )
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            start_BX=starts,
            rows_BRX=None,
        )

    def _read(
        self,
        hidden_BNH: Tensor,
        next_BN: Tensor,
        counts_B: Tensor,
        target: Target,
        caches: list[LayerCache],
        counts: list[int] | None = None,
    ) -> Tensor:
        """Starts [B,X] at the last of each sequence's `counts_B` new rows.

        `counts` are the same numbers on the host, where they are known.
        """
        hidden_BNH = hidden_BNH.to(self.precision)
        # Without layers of its own a start depends on the last row only.
        if not caches:
            last = counts_B[:, None] - 1
            hidden_BNH = rows_at(hidden_BNH, last)
            next_BN, counts_B = next_BN.gather(1, last), torch.ones_like(counts_B)
        # With layers all new rows are read, and those after the counts leave the caches again.
        begun = caches[0].lengths_B if caches else torch.zeros_like(counts_B)
        rows = causal_rows(begun, hidden_BNH.shape[1])
        starts = self.begin(hidden_BNH, next_BN, target, rows, caches)
        for cache in caches:
            cache.keep(counts_B, counts)
        return rows_at(starts, counts_B[:, None] - 1)[:, 0]

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node; the step reads the node's own
        token.
        """
        assert isinstance(state, HeadState)
        target = state.context.target
        # Memory of each node's parent: the start at depth 0, a row of this proposal after it.
        before = (
            state.start_BX[:, None]
            if frontier.depth == 0 or state.rows_BRX is None
            else rows_at(state.rows_BRX, frontier.parents_BW)
        )
        memory = self.step(frontier.depth, before, frontier.tokens_BW, target)
        # Later levels look their parents' memory up among all rows so far.
        memories = (
            [memory] if frontier.depth == 0 or state.rows_BRX is None else [state.rows_BRX, memory]
        )
        state.rows_BRX = torch.cat(memories, dim=1)
        return self.head(frontier.depth, target)(
            self.feature(frontier.depth, memory, frontier.tokens_BW, target)
        )

    def run_own_layers(
        self, hidden_BNH: Tensor, rows: Rows, caches: list[LayerCache] | None
    ) -> Tensor:
        """Its own decoder layers [B,N,H] -> [B,N,H]."""
        return run_layers(self.layers, hidden_BNH, rows, caches)


def refuse_unknown(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a key's value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def soft_labels(labels: str) -> bool:
    """Whether `labels` (`"soft"` or `"hard"`) selects the target's distribution instead of the
    tokens of the data.
    """
    refuse_unknown("labels", labels, ("soft", "hard"))
    return labels == "soft"

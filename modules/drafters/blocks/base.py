"""What block drafters share: K tokens from one pass, served level by level to any tree builder.

A block is anchored at the newest token x_{t+1}; the last available target state is f_t, of the
token before it. Slot d of the block drafts x_{t+2+d}, as step d of every trained drafter does.

Shape legend: B sequences, T tokens of a packed row, N committed rows, M blocks of a training batch,
W frontier nodes, K tokens of a block, H hidden size, X width of what is read, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.verification import Accepted, Verified
from modules.drafters.blocks.proposal import Proposal
from modules.drafters.trained import DraftStep, TrainedDrafter
from modules.losses.averages import SharedCount
from modules.losses.chunked import Head, TrainingRows

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class BlockState(DraftState):
    """State of a block drafter's sequences; subclasses add their state of the prefix.

    proposal: the blocks of the current proposal; None between two proposals.
    """

    proposal: Proposal | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class SlotLosses:
    """Losses of all slots of all blocks, not yet divided: the counts of a loss's other means may be
    shared with theirs.

    total: Σ w·loss. weight: Σ w. metrics: of the slots.
    """

    total: Tensor
    weight: SharedCount
    metrics: dict[str, Mean]

    def mean(self) -> Tensor:
        """Σ w·loss / Σ w, of all processes."""
        return self.total / self.weight.divisor()


class BlockDrafter(TrainedDrafter):
    """Base of the drafters that draft K tokens in one pass.

    Subclasses define `blank_state`, `read` and `block_logits` for decoding, and `block_outputs` for
    training. The head is the target's frozen LM head unless `head` is overridden. Optional:

    - `next_block_logits`: further blocks after drafted nodes; then `max_depth` is None;
    - `conditioned` with `unrolled`: logits of a slot that depend on the tokens drafted before it;
    - `blocks`: which blocks of a batch are trained (anchors drawn per document, for instance);
    - `slot_weights`: weights of the slots in the loss.

    Args:
        shape: the target's dimensions.
        block: K, tokens drafted per pass.
        draft_vocabulary: D, how many token ids can be drafted; None for all.
        decay: slot d weighs `decay ** d` in the loss.
    """

    depth_unit = "tokens in a block"

    def __init__(
        self, shape: TargetShape, block: int, draft_vocabulary: int | None, decay: float
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1 token per pass, got {block}")
        super().__init__(shape, block, draft_vocabulary, decay)
        self.block = block
        self._budget = block

    def head(self, depth: int, target: Target) -> Head:
        """The target's frozen LM head on the draft vocabulary."""
        return lambda hidden: target.logits(hidden, self.vocabulary_D, self.precision)

    def joined_states(self, states: Mapping[StateName, Tensor]) -> Tensor:
        """The target states that decoding reads, concatenated [...,X], in the drafter's dtype."""
        return torch.cat([states[name] for name in self.decoding_states], -1).to(self.precision)

    # -- training ----------------------------------------------------------------------------------

    @abstractmethod
    def block_outputs(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """The LM head's inputs [M,K,H] in the blocks that follow the training rows.

        The block of row t may read the states up to f_t and the tokens up to x_{t+1}, of its
        document only.
        """

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The LM head's inputs [M,H] slot by slot, each as a pair of itself: no slot reads another.

        A head that reads tokens of the block gets them here: `rows.tokens_MK1[:, d]` is the data's
        token before the one that slot d drafts.
        """
        return ((feature, feature) for feature in self.block_outputs(batch, target, rows).unbind(1))

    def blocks(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The blocks that the loss counts; other metrics count all `rows`."""
        return self.rows(batch, target)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Weighted mean over all slots of all blocks, and accuracies of the slots as metrics."""
        rows = self.blocks(batch, target)
        distributions = self.distributions(batch, target, rows)
        outputs = self.unrolled(batch, target, rows)
        return self.weighted(self.scored(batch, target, rows, distributions, outputs), batch)

    def slot_weights(self, losses_MK: Tensor, counted_MK: Tensor, valid_MK: Tensor) -> Tensor:
        """Weights [M,K] of the slots' losses, without gradient.

        Args:
            losses_MK: without gradient.
            counted_MK: bool, slots with a label to learn; others weigh nothing.
            valid_MK: bool, slots with a label, one that cannot be drafted included.
        """
        slots = torch.arange(self.block, device=losses_MK.device)
        return (self.decay**slots).to(losses_MK.dtype).expand_as(losses_MK)

    def weighted(self, steps: Iterable[DraftStep], batch: TextBatch) -> Losses:
        """Σ w·loss / Σ w over the slots with a label, and the metrics."""
        slots = self.slot_losses(steps)
        return Losses(slots.mean(), slots.metrics)

    def slot_losses(self, steps: Iterable[DraftStep]) -> SlotLosses:
        """Both sums over the slots with a label, and the metrics.

        `accepted` is the mean number of correct tokens at the beginning of a block. The slots'
        accuracies do not determine it.
        """
        steps = list(steps)
        # One mean over all slots of all blocks, of all processes.
        losses_MK = torch.stack([step.losses_M for step in steps], 1)
        counted_MK = torch.stack([step.counted_M for step in steps], 1)
        valid_MK = torch.stack([step.valid_M for step in steps], 1)
        weights_MK = self.slot_weights(losses_MK.detach(), counted_MK, valid_MK) * counted_MK
        total, weight = (weights_MK * losses_MK).sum(), SharedCount(weights_MK.sum())
        # A run of correct tokens ends at the first slot that is wrong or has no label.
        right_MK = torch.stack([(step.ranks_M < 1) & step.valid_M for step in steps], 1)
        runs_M = right_MK.int().cumprod(1).sum(1)
        metrics = {"accepted": Mean(runs_M.sum(), steps[0].valid_M.sum())}
        for step in steps:
            metrics |= step.metrics()
        return SlotLosses(total, weight, metrics)

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The target state that a block starts from."""
        return (self.reads,)

    @property
    def max_depth(self) -> int | None:
        """K, the tokens of a block; None where further blocks follow the first."""
        return self.block

    @abstractmethod
    def blank_state(self, context: Context) -> BlockState:
        """The state before the prompts are read."""

    @abstractmethod
    def read(
        self,
        state: BlockState,
        features_BNX: Tensor,
        following_BN: Tensor,
        counts_B: Tensor,
        counts: list[int] | None = None,
    ) -> BlockState:
        """The state after newly committed rows, such as keys and values appended to a context.

        Args:
            state: of the sequences so far.
            features_BNX: the rows' target states (`joined_states`).
            following_BN: int64, the token that follows each row.
            counts_B: how many of the N rows each sequence has; the others are padding.
            counts: the same on the host, where it is known.
        """

    @abstractmethod
    def block_logits(self, state: BlockState) -> Tensor:
        """Logits [B,K,D] of the K tokens that follow the newest one (`state.newest_B`)."""

    def next_block_logits(self, state: BlockState, frontier: Frontier, above_BW: Tensor) -> Tensor:
        """Logits [B,W,K,D] of the K tokens that follow each frontier node.

        Args:
            state: with the proposal so far; `state.proposal.last_tokens` gives the paths' tokens.
            frontier: nodes that end a block.
            above_BW: int64, the numbers of the blocks that they end.
        """
        raise ValueError(
            f"{type(self).__name__} drafts a single block of {self.block} tokens: it has no next"
        )

    def conditioned(self, state: BlockState, frontier: Frontier, logits_BWD: Tensor) -> Tensor:
        """Logits of a level [B,W,D], conditioned on the drafted tokens; unchanged by default."""
        return logits_BWD

    def start(self, context: Context) -> DraftState:
        """State after the prompts, from the target's states of them."""
        blank, features = self.blank_state(context), self.joined_states(context.states)
        return self.read(blank, features, context.following_BT, context.lengths_B)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State after the accepted rows, which may come from any tree."""
        assert isinstance(state, BlockState)
        features = accepted.along_path(self.joined_states(verified.states))
        following = accepted.emitted(verified.tree)
        state = self.read(state, features, following, accepted.lengths_B, accepted.lengths)
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            proposal=None,
        )

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node: slot `depth % K` of its block."""
        assert isinstance(state, BlockState)
        slot, width = frontier.depth % self.block, frontier.tokens_BW.shape[1]
        # The first pass gives the logits of the K levels after the prefix.
        if frontier.depth == 0:
            state.proposal = Proposal.begin(frontier, self.block_logits(state))
        assert state.proposal is not None, "a proposal begins at depth 0"
        if frontier.depth > 0:
            # Children stay in their parent's block until its slots are used.
            blocks_BW = state.proposal.blocks_BR.gather(1, frontier.parents_BW)
            if slot == 0:
                logits_BWKD = self.next_block_logits(state, frontier, blocks_BW)
                blocks_BW = state.proposal.next_pass(logits_BWKD)
            state.proposal.add(frontier, blocks_BW)
        return self.conditioned(state, frontier, state.proposal.slot_logits(slot, width))

"""What the head families share: a draft vocabulary, LM heads, the teacher-forced loop over depths, draft states.

A head drafter reads one target state per position, turns it into a start (at the newest position once per proposal),
and takes one step per draft depth: step d is told token x_{t+1+d} and drafts x_{t+2+d}.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, W frontier nodes, R rows of a proposal, M
training rows, K heads, H hidden size, X size of a step's memory, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from modules.core.batches import Rows, StateName, TextBatch
from modules.core.drafter import Accepted, Context, Drafter, DraftState, Frontier, TreeBuilder, Verified
from modules.core.layers import DecoderLayer, LayerCache, causal_rows, run_layers
from modules.core.losses import (
    IGNORED,
    Head,
    Laws,
    TrainingRows,
    accuracy,
    cross_entropy,
    depth_weights,
    draft_labels,
    masked_mean,
    target_laws,
    training_rows,
)
from modules.core.narrow import narrow_linear
from modules.core.trainable import Losses, Mean, TargetShape
from modules.trees.paths import Path, tree_paths
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.core.target import Target


CHEAP_BUDGET = 5
"""Drafted nodes that, with the root, a CPU verifies for a fifth more than one row takes."""


@dataclass
class HeadState(DraftState):
    """A head drafter's knowledge of its sequences.

    start_BX: what a proposal starts from, at the last position the target has read.
    caches: keys and values of the drafter's own layers, one each.
    rows_BRX: the memory of each row handed to `expand` in this proposal.
    """

    start_BX: Tensor
    caches: list[LayerCache]
    rows_BRX: Tensor | None = None


@dataclass(frozen=True)
class DraftStep:
    """One draft step over the training rows.

    feature_MH: what its LM head read. labels_M: draft vocabulary indices, `IGNORED` where nothing is learnt.
    valid_M: rows whose label counts, in the draft vocabulary or not. losses_M, ranks_M: see `cross_entropy`.
    flat_M: flat positions of the target's laws of the labels. laws: those laws, if they are learnt.
    """

    depth: int
    feature_MH: Tensor
    labels_M: Tensor
    valid_M: Tensor
    losses_M: Tensor
    ranks_M: Tensor
    flat_M: Tensor
    laws: Laws | None

    @property
    def counted_M(self) -> Tensor:
        """bool [M]: rows with a label to learn."""
        return self.labels_M != IGNORED

    def metrics(self) -> dict[str, Mean]:
        """Cross-entropy, top-1 and top-5 accuracy (a label that cannot be drafted is a miss)."""
        entropies = Mean(self.losses_M.detach().sum(), self.counted_M.sum())
        return {f"cross_entropy_{self.depth}": entropies, f"top1_{self.depth}": accuracy(self.ranks_M, self.valid_M, 1),
                f"top5_{self.depth}": accuracy(self.ranks_M, self.valid_M, 5)}


class HeadDrafter(Drafter):
    """Base of the head families.

    Subclasses give `step` and `feature`, and override `begin` when their start is more than the target's state.

    Args:
        shape: the target's dimensions.
        heads: K, how many tokens are drafted in a row.
        draft_vocabulary: D, how many token ids can be drafted; None, or as many as the target has, means all of them.
        decay: loss weight of step d, `decay ** (d + first_exponent)`.
    """

    reads: ClassVar[StateName] = "final"
    """The target state it starts from."""
    soft_labels: ClassVar[bool] = False
    """Whether it learns the target's law (restricted to the draft vocabulary) rather than the tokens of the data."""
    first_exponent: ClassVar[int] = 1

    def __init__(self, shape: TargetShape, heads: int, draft_vocabulary: int | None, decay: float) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if draft_vocabulary is not None and draft_vocabulary < 1:
            raise ValueError(f"draft_vocabulary must be at least 1 (or null for all tokens), got {draft_vocabulary}")
        self.shape, self.heads, self.decay = shape, heads, decay
        trimmed = draft_vocabulary is not None and draft_vocabulary < shape.vocab_size
        self.register_buffer("vocabulary", torch.arange(cast(int, draft_vocabulary)) if trimmed else None)
        self.layers = nn.ModuleList()
        self.lm_heads = nn.ModuleList()
        self._builder: TreeBuilder = StaticTree.chain(heads)
        self._budget = CHEAP_BUDGET

    # -- draft vocabulary and LM heads ------------------------------------------------------------------------

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids that can be drafted [D], ascending; None: all of them."""
        return cast(Tensor | None, self.vocabulary)

    @property
    def draft_size(self) -> int:
        """D."""
        return self.shape.vocab_size if self.vocabulary_D is None else len(self.vocabulary_D)

    def set_vocabulary(self, ids: Tensor | Iterable[int]) -> None:
        """Choose the tokens that can be drafted; before `initialise`, which copies the LM head's rows for them.

        Raises ValueError unless there are exactly `draft_vocabulary` different ids of the target's vocabulary.
        """
        chosen = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids)).long().unique()
        if len(chosen) != self.draft_size or int(chosen[0]) < 0 or int(chosen[-1]) >= self.shape.vocab_size:
            raise ValueError(f"draft_vocabulary is {self.draft_size} but {len(chosen)} different ids were given: give "
                             f"that many ids below {self.shape.vocab_size}, or set draft_vocabulary to {len(chosen)}")
        if self.vocabulary_D is not None:
            self.vocabulary = chosen.to(self.vocabulary_D.device)

    def use_own_lm_heads(self, bias: bool) -> None:
        """Give every step a trainable LM head of its own, copied from the target's by `initialise`."""
        self.lm_heads = nn.ModuleList(nn.Linear(self.shape.hidden_size, self.draft_size, bias)
                                      for _ in range(self.heads))

    def head(self, depth: int, target: Target) -> Head:
        """Features [..., H] of step `depth` -> logits [..., D]: by its own LM head, or by the target's frozen one."""
        if not self.lm_heads:
            return lambda hidden: target.logits(hidden, self.vocabulary_D)
        own = cast(nn.Linear, self.lm_heads[depth])
        return lambda hidden: narrow_linear(hidden, own.weight, own.bias)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the target's LM head into own LM heads, its last layer (where of their kind) into own layers."""
        for layer in self.layers:
            cast(DecoderLayer, layer).copy_from(target)
        every = torch.arange(self.shape.vocab_size, device=target.device)
        for own in self.lm_heads:
            rows = target.lm_head_rows(every if self.vocabulary_D is None else self.vocabulary_D.to(target.device))
            cast(nn.Linear, own).weight.copy_(rows)
            if own.bias is not None:
                nn.init.zeros_(cast(Tensor, own.bias))

    # -- what makes a family ----------------------------------------------------------------------------------

    def begin(self, hidden_BNH: Tensor, next_BN: Tensor, target: Target, rows: Rows,
              caches: list[LayerCache] | None) -> Tensor:
        """Starts [B,N,X] from the target's states at consecutive positions and the tokens that follow them."""
        return hidden_BNH

    def step(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """Memory [..., X] after step `depth` is told token x_{t+1+depth} [...]."""
        return memory_NX

    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """What the LM head of step `depth` reads [..., H]."""
        raise NotImplementedError

    # -- training ---------------------------------------------------------------------------------------------

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """The state it starts from, and the target's laws if it learns those."""
        return tuple(dict.fromkeys((self.reads, "final"))) if self.soft_labels else (self.reads,)

    def teacher_forced(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Iterator[Tensor]:
        """The LM heads' inputs [M,H], step by step, given the data's own tokens."""
        following = batch.input_ids.roll(-1, 1)
        starts = self.begin(batch.states[self.reads], following, target, batch.rows(), None)
        memory = rows.take(starts)
        for depth in range(self.heads):
            tokens = rows.tokens_MK1[:, depth]
            memory = self.step(depth, memory, tokens, target)
            yield self.feature(depth, memory, tokens, target)

    def labels(self, rows: TrainingRows) -> Tensor:
        """Draft vocabulary indices [M,K], `IGNORED` where the label does not count or cannot be drafted."""
        labels = draft_labels(rows.tokens_MK1[:, 1:].contiguous(), self.vocabulary_D)
        return labels.masked_fill(~rows.valid_MK, IGNORED)

    def laws(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Laws | None:
        """The target's laws of the labels, if they are learnt."""
        if not self.soft_labels:
            return None
        return target_laws(lambda hidden: target.logits(hidden, self.vocabulary_D), batch.states["final"],
                           rows.flat_MK1[:, 1:], self.draft_size)

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """Every draft step over the batch's training rows, with teacher forcing."""
        rows = training_rows(batch, self.heads)
        labels, laws = self.labels(rows), self.laws(batch, target, rows)
        for depth, feature in enumerate(self.teacher_forced(batch, target, rows)):
            labels_M, flat_M = labels[:, depth].contiguous(), rows.flat_MK1[:, depth + 1].contiguous()
            losses, ranks = cross_entropy(feature, self.head(depth, target), labels_M, self.draft_size, laws, flat_M)
            yield DraftStep(depth, feature, labels_M, rows.valid_MK[:, depth], losses, ranks, flat_M, laws)

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """What a step contributes to the loss, before its weight."""
        return masked_mean(step.losses_M, step.counted_M)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Σ_d decay^(d+first_exponent) · loss of step d; per-step accuracies as metrics."""
        weights = depth_weights(self.heads, self.decay, self.decay ** self.first_exponent)
        total, metrics = torch.zeros((), device=batch.input_ids.device), {}
        for step in self.steps(batch, target):
            total = total + weights[step.depth] * self.step_loss(step, batch)
            metrics |= step.metrics()
        return Losses(total, metrics)

    # -- decoding ---------------------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The state it starts from."""
        return (self.reads,)

    @property
    def builder(self) -> TreeBuilder:
        """The tree it was built with."""
        return self._builder

    @property
    def default_budget(self) -> int:
        """All of a tree that was asked for; of `narrow` and of dynamic trees what a CPU verifies almost for free."""
        return self._budget

    @property
    def max_depth(self) -> int:
        """As many as it has heads."""
        return self.heads

    def use_static_tree(self, tree: list[Path] | str) -> None:
        """Draft fixed paths, given in full or by name (`modules.trees.paths`)."""
        static = StaticTree(tree_paths(tree, self.heads))
        self._builder, self._budget = static, CHEAP_BUDGET if tree == "narrow" else len(static.paths)

    def start(self, context: Context) -> HeadState:
        """Read the prompts' states."""
        hidden = context.states[self.reads]
        caches = [LayerCache.empty(self.shape, context.lengths_B, self.precision) for _ in self.layers]
        last = context.lengths_B[:, None] - 1
        following = context.input_ids_BT.roll(-1, 1).scatter(1, last, context.newest_B[:, None])
        starts = self._read(hidden, following, context.lengths_B, context.target, caches)
        return HeadState(context, context.newest_B, context.lengths_B, starts, caches)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> HeadState:
        """Read the accepted rows' states, of whatever tree they were."""
        assert isinstance(state, HeadState)
        hidden = accepted.along_path(verified.states[self.reads])
        starts = self._read(hidden, accepted.emitted(verified.tree), accepted.lengths_B, state.context.target,
                            state.caches)
        return replace(state, newest_B=accepted.next_B, lengths_B=state.lengths_B + accepted.lengths_B,
                       start_BX=starts, rows_BRX=None)

    def _read(self, hidden_BNH: Tensor, next_BN: Tensor, counts_B: Tensor, target: Target,
              caches: list[LayerCache]) -> Tensor:
        """Starts at the last of each sequence's `counts_B` new rows [B,X]."""
        hidden_BNH = hidden_BNH.to(self.precision)
        if not caches:
            last = counts_B[:, None] - 1
            hidden_BNH = _at(hidden_BNH, last)
            next_BN, counts_B = next_BN.gather(1, last), torch.ones_like(counts_B)
        begun = caches[0].lengths_B if caches else torch.zeros_like(counts_B)
        rows = causal_rows(begun, hidden_BNH.shape[1])
        starts = self.begin(hidden_BNH, next_BN, target, rows, caches)
        for cache in caches:
            cache.keep(counts_B)
        return _at(starts, counts_B[:, None] - 1)[:, 0]

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node, whose own token its step is told."""
        assert isinstance(state, HeadState)
        target = state.context.target
        before = (state.start_BX[:, None] if frontier.depth == 0 or state.rows_BRX is None
                  else _at(state.rows_BRX, frontier.parents_BW))
        memory = self.step(frontier.depth, before, frontier.tokens_BW, target)
        kept = [memory] if frontier.depth == 0 or state.rows_BRX is None else [state.rows_BRX, memory]
        state.rows_BRX = torch.cat(kept, dim=1)
        return self.head(frontier.depth, target)(self.feature(frontier.depth, memory, frontier.tokens_BW, target))

    @property
    def precision(self) -> torch.dtype:
        """Of its own weights, which may differ from the target's."""
        return next(self.parameters()).dtype

    def run_own_layers(self, hidden_BNH: Tensor, rows: Rows, caches: list[LayerCache] | None) -> Tensor:
        """Its own decoder layers [B,N,H] -> [B,N,H]."""
        return run_layers(self.layers, hidden_BNH, rows, caches)


def _at(rows_BNX: Tensor, index_BW: Tensor) -> Tensor:
    """Rows [B,N,X] at per-sequence indices [B,W,X]."""
    return rows_BNX.gather(1, index_BW[..., None].expand(-1, -1, rows_BNX.shape[-1]))


@torch.no_grad()
def measured_accuracies(drafter: HeadDrafter, batches: Iterable[TextBatch], target: Target, ranks: int = 10) -> Tensor:
    """Table [K,ranks]: how often the rank-i draft of step k is the token that came (for `trees.optimise`)."""
    hits, counts = torch.zeros(drafter.heads, ranks), torch.zeros(drafter.heads)
    for batch in batches:
        for step in drafter.steps(batch, target):
            found = step.ranks_M[step.valid_M].clamp(max=ranks)
            hits[step.depth] += found.bincount(minlength=ranks + 1)[:ranks].cpu()
            counts[step.depth] += len(found)
    return hits / counts.clamp(min=1)[:, None]

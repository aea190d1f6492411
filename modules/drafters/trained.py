"""What trained drafters share: a draft vocabulary, training step by step, a default tree.

Step d of a drafter, given the tokens up to x_{t+1+d}, drafts x_{t+2+d}.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, W chosen rows, M training
rows, K draft steps, H hidden size, X any width, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Drafter, TreeBuilder
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint, TrainingResult
from modules.losses.averages import SharedCount
from modules.losses.chunked import (
    IGNORED,
    Distributions,
    Divergence,
    Head,
    TrainingRows,
    accuracy,
    covered_distributions,
    cross_entropy,
    depth_weights,
    draft_labels,
    greedy_tokens,
    masked_mean,
    target_distributions,
    training_rows,
)
from modules.losses.divergences import (
    DIVERGENCES,
    EVERY_LABEL,
    UNNORMALISED,
    checked_divergence,
    ended,
)
from modules.trees.expected_length import expected_length, optimised_tree
from modules.trees.named_trees import Path, optimised_size, tree_paths
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target

CHEAP_BUDGET = 5
"""Drafted nodes that, with the root, a CPU verifies for a fifth more than one row takes."""
WIDE_BUDGET, WIDE_TREE = 60, "mc_sim_7b_63"
"""Drafted nodes of feature drafters, and the static tree of Medusa and Hydra, by default on a GPU,
which reads the weights once for so many rows (not measured here): as many as EAGLE-2 and -3 draft,
and Medusa's released tree."""
WIDE_LEVEL = 10
"""Nodes of a level that EAGLE-2 expands."""


@dataclass(frozen=True)
class DraftStep:
    """One draft step over the training rows.

    feature_MH: input of its LM head.
    carried_MH: input of the next step, where that is a feature too.
    labels_M: draft vocabulary indices, `IGNORED` where nothing is learnt.
    valid_M: rows whose label counts, in the draft vocabulary or not.
    losses_M, ranks_M: see `cross_entropy`.
    flat_M: flat positions of the target's distributions of the labels.
    distributions: those distributions, if they are learnt.
    loss_name: of the losses among the metrics.
    every_label: whether labels outside the draft vocabulary count.
    counts_2K: of all steps, rows with a label and rows with one in the draft vocabulary; None where
        the step's losses are not averaged by `mean`.
    """

    depth: int
    feature_MH: Tensor
    carried_MH: Tensor
    labels_M: Tensor
    valid_M: Tensor
    losses_M: Tensor
    ranks_M: Tensor
    flat_M: Tensor
    distributions: Distributions | None
    loss_name: str = "cross_entropy"
    every_label: bool = False
    counts_2K: SharedCount | None = None

    @property
    def counted_M(self) -> Tensor:
        """bool [M]: rows that the loss counts."""
        return self._rows(self.every_label)

    def mean(self, values_M: Tensor, every_label: bool | None = None) -> Tensor:
        """Mean over the rows that the loss counts, of all processes; 0 (with a gradient of 0)
        without any.

        Args:
            values_M: one of each row.
            every_label: whether labels outside the draft vocabulary count; None: as in the loss.
        """
        every = self.every_label if every_label is None else every_label
        if self.counts_2K is None:
            return masked_mean(values_M, self._rows(every))
        divisor = self.counts_2K.divisor()[0 if every else 1, self.depth]
        return (values_M * self._rows(every)).sum() / divisor

    def _rows(self, every_label: bool) -> Tensor:
        return self.valid_M if every_label else self.labels_M != IGNORED

    def metrics(self) -> dict[str, Mean]:
        """The loss, top-1 and top-5 accuracy (a label that cannot be drafted is a miss)."""
        losses = Mean(self.losses_M.detach().sum(), self.counted_M.sum())
        return {
            f"{self.loss_name}_{self.depth}": losses,
            f"top1_{self.depth}": accuracy(self.ranks_M, self.valid_M, 1),
            f"top5_{self.depth}": accuracy(self.ranks_M, self.valid_M, 5),
        }


class TrainedDrafter(Drafter):
    """Base of the drafters that learn to draft K steps ahead from the target's states.

    Subclasses define `teacher_forced`, the inputs of their LM head step by step, and `head`.

    Args:
        shape: the target's dimensions.
        steps: K, draft steps that are trained.
        draft_vocabulary: D, how many token ids can be drafted; None, or as many as the target has,
            means all of them.
        decay: loss weight of step d, `decay ** (d + first_exponent)`.
    """

    reads: StateName = "final"
    """The target state it starts from."""
    soft_labels: bool = False
    """Whether it learns the target's distribution (restricted to the draft vocabulary) rather than
    the tokens of the data.
    """
    text_weight: float = 0.0
    """Weight of the cross-entropy to the data's tokens, beside the divergence from the target's
    distributions."""
    divergence_name: str = "cross_entropy"
    """The loss where distributions are learnt, of `DIVERGENCES`."""
    first_exponent: ClassVar[int] = 1
    stored_bytes: ClassVar[tuple[float, float, float]] = (64.0, 64.0, 8.0)
    """Bytes that a draft step stores per token for its backward pass, as multiples of the hidden
    size: in float32, in mixed precision, and where the step is recomputed. Families that were
    measured have their own, at a feed-forward network of 3.5 times the hidden size."""
    recompute = False
    """Whether activations are recomputed in the backward pass instead of stored."""

    def __init__(
        self, shape: TargetShape, steps: int, draft_vocabulary: int | None, decay: float
    ) -> None:
        super().__init__()
        if draft_vocabulary is not None and draft_vocabulary < 1:
            raise ValueError(
                "draft_vocabulary must be at least 1 (or null for all tokens), got "
                f"{draft_vocabulary}"
            )
        self.shape, self.draft_steps, self.decay = shape, steps, decay
        trimmed = draft_vocabulary is not None and draft_vocabulary < shape.vocab_size
        self.register_buffer(
            "vocabulary", torch.arange(cast(int, draft_vocabulary)) if trimmed else None
        )
        self._builder: TreeBuilder = StaticTree.chain(max(1, steps))
        self._budget = CHEAP_BUDGET
        self._wide: tuple[TreeBuilder | None, int] = (None, 0)
        self._optimised_nodes: int | None = None

    # -- draft vocabulary --------------------------------------------------------------------------

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids that can be drafted [D], ascending; None: all of them."""
        return cast(Tensor | None, self.vocabulary)

    @property
    def draft_size(self) -> int:
        """D: how many tokens can be drafted."""
        return self.shape.vocab_size if self.vocabulary_D is None else len(self.vocabulary_D)

    def set_vocabulary(self, ids: Tensor | Iterable[int]) -> None:
        """Choose the tokens that can be drafted; before `initialise`, which copies the LM head's
        rows for them.

        The ids are stored in ascending order: index d of every head and of every saved map from
        draft to target ids is the d-th smallest id. Raises ValueError unless there are exactly
        `draft_vocabulary` different ids of the target's vocabulary, each listed once.
        """
        # Refuse duplicates, and a count or range that differs from the constructor's.
        listed = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids)).long()
        chosen = listed.unique()
        if len(listed) > len(chosen):
            raise ValueError(
                f"the draft vocabulary was given {len(listed) - len(chosen)} ids twice: give each "
                "once"
            )
        if (
            len(chosen) != self.draft_size
            or int(chosen[0]) < 0
            or int(chosen[-1]) >= self.shape.vocab_size
        ):
            raise ValueError(
                f"draft_vocabulary is {self.draft_size} but {len(chosen)} different ids were "
                f"given: give that many ids below {self.shape.vocab_size}, or set draft_vocabulary "
                f"to {len(chosen)}"
            )
        # Without a trimmed vocabulary all ids are drafted and there is no buffer to fill.
        if self.vocabulary_D is not None:
            self.vocabulary = chosen.to(self.vocabulary_D.device)

    @abstractmethod
    def head(self, depth: int, target: Target) -> Head:
        """Features [..., H] of step `depth` -> logits [..., D]."""

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Its draft steps, and whether they learn distributions."""
        whole = super().footprint(rows, length)
        *steps, inputs = self.stored_bytes
        return replace(
            whole,
            steps=self.draft_steps,
            soft=self.soft_labels,
            step_bytes=(steps[0], steps[1]),
            input_bytes=inputs,
        )

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """The state it starts from, and the target's distributions if it learns those."""
        return tuple(dict.fromkeys((self.reads, "final"))) if self.soft_labels else (self.reads,)

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,H], step by step, given the data's own tokens. A subclass defines
        this or `unrolled`.
        """
        return (feature for feature, _ in self.unrolled(batch, target, rows))

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The LM head's inputs [M,H] and the next step's inputs [M,H], step by step. By default no
        step reads another's outputs.
        """
        return ((feature, feature) for feature in self.teacher_forced(batch, target, rows))

    def rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The rows of a batch that losses and metrics count."""
        return training_rows(batch, self.draft_steps)

    def measured_rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The rows that `measured_accuracies` counts: all of them."""
        return training_rows(batch, self.draft_steps)

    def labels(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """Draft vocabulary indices [M,K], `IGNORED` where the label does not count or cannot be
        drafted.

        Rows whose token cannot be drafted are left out also where distributions are learnt. On text
        sampled from the target, a row then counts with probability p(D), the mass that its
        distribution p puts on the draft vocabulary D. The expected loss is
        -Σ_{v in D} p(v) log q(v): the cross-entropy over the whole vocabulary without the tokens
        that cannot be drafted. Weighting every row by p(D) has the same expectation and less
        variance, but needs the whole LM head. It gave 0.0004 more expected acceptance on tiny
        targets' text (15 % of it outside D), 0.0007 on text of another writer (27 %).
        """
        labels = draft_labels(rows.tokens_MK1[:, 1:].contiguous(), self.vocabulary_D)
        return labels.masked_fill(~rows.valid_MK, IGNORED)

    def labels_by_target(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """`labels` of the target's most likely tokens instead of the text's own; reads the `final`
        states and the whole LM head.
        """
        # Steps share positions, so each one's greedy token is computed once.
        unique, index = rows.flat_MK1[:, 1:].unique(return_inverse=True)
        final_UH = batch.states["final"].flatten(0, 1)[unique]
        likely = draft_labels(
            greedy_tokens(target.logits, final_UH, self.shape.vocab_size), self.vocabulary_D
        )
        return likely[index].masked_fill(~rows.valid_MK, IGNORED)

    def distributions(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Distributions | None:
        """The target's distributions of the labels, if they are learnt; in float32 also for a
        16-bit target. Those that come with the batch are taken as they are.
        """
        if not self.soft_labels:
            return None
        if self.divergence_name in UNNORMALISED:
            return self.covered(batch, target, rows.flat_MK1[:, 1:])
        if (teacher := batch.teacher) is not None:

            def recorded(flat_M: Tensor) -> Tensor:
                probs = teacher.over(flat_M, self.vocabulary_D)
                return probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)

            return recorded
        return target_distributions(
            lambda hidden: target.unrounded_logits(hidden, self.vocabulary_D),
            batch.states["final"],
            rows.flat_MK1[:, 1:],
            self.draft_size,
        )

    def covered(self, batch: TextBatch, target: Target, positions: Tensor) -> Distributions:
        """The target's probabilities of the draft tokens as they are, not renormalised; over a
        trimmed vocabulary they take the whole LM head.
        """
        if batch.teacher is not None:
            return partial(batch.teacher.over, vocabulary_D=self.vocabulary_D)
        head, final, size = target.unrounded_logits, batch.states["final"], target.shape.vocab_size
        if self.vocabulary_D is None:
            return target_distributions(head, final, positions, size)
        return covered_distributions(head, final, positions, self.vocabulary_D, size)

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """Every draft step over the batch's training rows, given the data's own tokens."""
        rows = self.rows(batch, target)
        distributions = self.distributions(batch, target, rows)
        return self.scored(batch, target, rows, distributions, self.unrolled(batch, target, rows))

    def scored(
        self,
        batch: TextBatch,
        target: Target,
        rows: TrainingRows,
        distributions: Distributions | None,
        outputs: Iterable[tuple[Tensor, Tensor]],
    ) -> Iterator[DraftStep]:
        """The outputs of `unrolled` over these rows, compared with their labels or distributions:
        one `DraftStep` per depth.
        """
        labels_MK = self.labels(batch, target, rows)
        counted_2MK = torch.stack([rows.valid_MK, labels_MK != IGNORED])
        return self.compared(
            rows,
            labels_MK,
            distributions,
            outputs,
            lambda depth: self.head(depth, target),
            self.divergence,
            counts_2K=SharedCount(counted_2MK.sum(1)),
        )

    def compared(
        self,
        rows: TrainingRows,
        labels_MK: Tensor,
        distributions: Distributions | None,
        outputs: Iterable[tuple[Tensor, Tensor]],
        heads: Callable[[int], Head],
        divergence: Divergence,
        first: int = 0,
        ended_M: Tensor | None = None,
        counts_2K: SharedCount | None = None,
    ) -> Iterator[DraftStep]:
        """The same with other labels, heads or another divergence than the drafter's.

        Args:
            rows, labels_MK, distributions, outputs, heads, divergence: what is compared.
            first: the depth of the first outputs.
            ended_M: how often chains have ended before it (`ended`); None: never.
            counts_2K: see `DraftStep`.
        """
        every = self.divergence_name in EVERY_LABEL
        loss_name = self.divergence_name if self.soft_labels else "cross_entropy"
        ended_M = torch.zeros((), device=labels_MK.device) if ended_M is None else ended_M
        for depth, (feature, carried) in enumerate(outputs, first):
            # Step `depth` predicts the token, or the distribution, one position further on.
            labels_M, valid_M = labels_MK[:, depth].contiguous(), rows.valid_MK[:, depth]
            flat_M = rows.flat_MK1[:, depth + 1].contiguous()
            losses, ranks = cross_entropy(
                feature,
                heads(depth),
                labels_M,
                self.draft_size,
                distributions,
                flat_M,
                divergence,
                self.text_weight,
                valid_M if every else None,
            )
            # A step without a label ends no chain.
            if self.divergence_name == "expected_length":
                losses = ended_M = ended(ended_M, losses)
            yield DraftStep(
                depth,
                feature,
                carried,
                labels_M,
                valid_M,
                losses,
                ranks,
                flat_M,
                distributions,
                loss_name,
                every,
                counts_2K,
            )

    def divergence(self, logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
        """The loss per row [M] where distributions are learnt."""
        return DIVERGENCES[self.divergence_name](logits_MD, probs_MD)

    def use_divergence(self, name: str | None, learns: bool = False) -> None:
        """Compare with the target's distributions by one of `DIVERGENCES`.

        Args:
            name: of the divergence; None for the tokens of the data, without distributions.
            learns: whether a name alone means that distributions are learnt.

        Raises:
            ValueError: an unknown name, or a divergence from hard labels.
        """
        self.soft_labels = self.soft_labels or (learns and name is not None)
        self.divergence_name = checked_divergence(name or "cross_entropy")
        default = type(self).divergence_name
        if not self.soft_labels and self.divergence_name != default:
            raise ValueError(
                f"divergence {name!r} compares with the target's distributions, but labels is "
                f"'hard': set labels to 'soft', or divergence to {default!r}"
            )

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """A step's loss before its weight."""
        return step.mean(step.losses_M)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Σ_d decay^(d+first_exponent) · loss of step d; per-step accuracies as metrics."""
        return self.weighted(self.steps(batch, target), batch)

    def weighted(self, steps: Iterable[DraftStep], batch: TextBatch) -> Losses:
        """The weighted sum of the steps' losses, and their metrics."""
        weights = depth_weights(self.draft_steps, self.decay, self.decay**self.first_exponent)
        total, metrics = torch.zeros((), device=batch.input_ids.device), {}
        for step in steps:
            total = total + weights[step.depth] * self.step_loss(step, batch)
            metrics |= step.metrics()
        return Losses(total, metrics)

    def finish(self, batches: Iterable[Any], target: Target) -> TrainingResult:
        """Where the tree is `optimised`: measure acceptance on the held-out batches, and save the
        best tree as the drafter's own.
        """
        if self._optimised_nodes is None:
            return TrainingResult()
        # Acceptance per depth and rank decides the tree; its paths become the saved argument.
        table = measured_accuracies(self, batches, target).tolist()
        paths = optimised_tree(table, self._optimised_nodes)
        self.use_static_tree(paths)
        self.arguments["tree"] = paths
        return TrainingResult(
            {
                "tree/expected_tokens": expected_length(
                    paths, [sorted(row, reverse=True) for row in table]
                )
            }
        )

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def builder(self) -> TreeBuilder:
        """The tree it was constructed with; by default, on a GPU, the family's wide tree if it has
        one.
        """
        return self._wide[0] if self._wide[0] is not None and self.on_gpu else self._builder

    @property
    def default_budget(self) -> int:
        """All nodes of a tree that was named in the config. For `narrow` and dynamic trees, what
        the device verifies at almost no extra cost: CHEAP_BUDGET, or on a GPU all of the family's
        wide tree.
        """
        return max(self._budget, self._wide[1]) if self.on_gpu else self._budget

    @property
    def on_gpu(self) -> bool:
        """Whether its weights are on a GPU."""
        weight = next(self.parameters(), None)
        return weight is not None and weight.device.type == "cuda"

    def use_static_tree(self, tree: list[Path] | str) -> None:
        """Draft fixed paths, listed or by name (`modules.trees.named_trees`).

        `optimised` and `optimised_N` request the best tree of so many nodes, which `finish` finds
        after training; until then the tree is `narrow`. A named tree is cut to the depth and the
        ranks that can be drafted. Raises ValueError for listed paths with a rank that no draft has.
        """
        # 1. The paths, from a name or as listed.
        self._optimised_nodes = optimised_size(tree)
        tree = tree if self._optimised_nodes is None else "narrow"
        paths = tree_paths(tree, self.max_depth, self.depth_unit)
        if isinstance(tree, str):
            # A tree by name is cut to the draft vocabulary as it is to the depth.
            paths = [path for path in paths if max(path) < self.draft_size]
        # 2. Listed paths are not cut, so their ranks are checked.
        static = StaticTree(paths)
        widest = max((path[-1] for path in static.paths), default=0)
        if widest >= self.draft_size:
            raise ValueError(
                f"tree has a rank of {widest}, but the draft vocabulary has {self.draft_size} "
                "tokens"
            )
        # 3. A tree that was chosen replaces the wide default of a GPU.
        self._builder, self._wide = static, (None, 0)
        self._budget = CHEAP_BUDGET if tree == "narrow" else len(static.paths)

    @property
    def precision(self) -> torch.dtype:
        """Dtype of its own weights, which may differ from the target's."""
        return next(self.parameters()).dtype


@torch.no_grad()
def measured_accuracies(
    drafter: TrainedDrafter, batches: Iterable[TextBatch], target: Target, ranks: int = 10
) -> Tensor:
    """Table [K,ranks] for `trees.expected_length`: the share of positions where the rank-i draft of
    step k is the target's greedy token, which greedy verification accepts. Without dropout, with
    the data's tokens as context.
    """
    hits, counts = torch.zeros(drafter.draft_steps, ranks), torch.zeros(drafter.draft_steps)
    training = drafter.training
    drafter.eval()
    for batch in batches:
        rows = drafter.measured_rows(batch, target)
        final_PH = final_states(batch, target).flatten(0, 1)
        for depth, (feature, _) in enumerate(drafter.unrolled(batch, target, rows)):
            # The label is the target's greedy token, not the one of the data.
            valid_M, flat_M = rows.valid_MK[:, depth], rows.flat_MK1[:, depth + 1]
            greedy_M = greedy_tokens(target.logits, final_PH[flat_M], drafter.shape.vocab_size)
            labels_M = draft_labels(greedy_M, drafter.vocabulary_D)
            _, ranks_M = cross_entropy(
                feature, drafter.head(depth, target), labels_M, drafter.draft_size
            )
            # The last bin holds every rank beyond the table and is dropped.
            counted_ranks = ranks_M[valid_M].clamp(max=ranks)
            hits[depth] += counted_ranks.bincount(minlength=ranks + 1)[:ranks].cpu()
            counts[depth] += len(counted_ranks)
    drafter.train(training)
    return hits / counts.clamp(min=1)[:, None]


def final_states(batch: TextBatch, target: Target) -> Tensor:
    """The target's `final` states of a batch [B,T,H]: the batch's own, or the norm of its
    `pre_norm` states, or else computed here.
    """
    if "final" in batch.states:
        return batch.states["final"]
    if "pre_norm" in batch.states:
        return target.final_norm(batch.states["pre_norm"].to(target.dtype))
    return target.features(batch, ("final",))["final"]

"""Parallel prompt decoding: trained embeddings after the newest token make the target's own pass
guess the tokens after the next one (Chen et al. 2024, arXiv 2405.18628).

Prompt token i is guess i of `modules.drafters.same_pass.base`.

Shape legend: B sequences, N nodes, P prompt rows, E embeddings of prompt tokens, H hidden size, X
concatenated states of an ensemble, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import TrainingResult
from modules.drafters.heads.base import refuse_unknown
from modules.drafters.same_pass.base import SamePassDrafter, started_embeddings
from modules.drafters.same_pass.guess_rows import GuessRows, Sees, guess_rows
from modules.drafters.same_pass.sparse_tree import (
    predicted_page,
    random_trees,
    sparse_trees,
    whole_trees,
)
from modules.drafters.trained import DraftStep
from modules.losses.chunked import Head, TrainingRows
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target

SPARSE = {"dynamic": sparse_trees, "full": whole_trees, "random": random_trees}
"""Kinds of sparse trees that the paper compares."""
MOST_EMBEDDINGS = 64
"""Limit on the prompt tokens, and on the embeddings of each."""


class PPD(SamePassDrafter):
    """Prompt tokens on a frozen target: only their embeddings are trained.

    Loss: (1/m) Σ_i decay^i KL(p_i ‖ q_i), with q_i the distribution of prompt token i and p_i
    the target's own after the text. The paper lets the target continue greedily from a cut; here
    the text of the data continues, best the target's own answers (`python -m data.regenerate`), so
    that one pass trains many cuts.

    The first call after the prompt verifies only the newest token, followed by prompt tokens. It
    gives a token and the first guesses; a pass of prompt tokens alone would give only guesses.

    Args:
        shape: the target's dimensions.
        prompts: m, prompt tokens, and how many tokens can be drafted in a row.
        ensemble: n, embeddings of each prompt token, at the same position. Member j sees the text
            and member j of earlier prompt tokens; the mean of their logits counts.
        text: the embeddings start as those of this text's tokens, repeated; null: random.
        labels: `soft` learns the target's distribution, `hard` the tokens of the data.
        groups: random cuts in the answers, after which prompt tokens are trained; evenly spaced
            in validation.
        groups_per: of each packed `row`, or of each `document` (with 1 group the paper's).
        random_cuts: draw the cuts anew in every step; else they are evenly spaced in training too.
        ensemble_mask: whether a member sees its own chain alone; else all members of earlier prompt
            tokens and of its own.
        weighting: of the members' logits: their `mean`, or weights that are `learned`.
        sparse: kind of sparse trees: `dynamic`; `full`, with all prompt tokens after every node; or
            `random`, drafts and prompt tokens drawn at random in calls of the same size.
        draft_vocabulary: how many token ids can be drafted; null for all.
        tree: paths, or a name of `modules.trees.named_trees`; null is the dynamic sparse tree.
        rows: of a call with a dynamic sparse tree: the newest token, drafts and prompt tokens; null
            is 12, on a GPU 64 (not measured there). The budget of an evaluation is one less.
        accuracies: how often the rank-r token of each prompt token is right, which sparse trees are
            made from; filled in by `finish`.
        decay: prompt token i weighs decay^i.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    depth_unit = "prompt tokens"

    def __init__(
        self,
        shape: TargetShape,
        prompts: int = 3,
        ensemble: int = 1,
        text: str | None = "The next words of the answer are",
        labels: Literal["soft", "hard"] = "soft",
        groups: int = 16,
        groups_per: Literal["row", "document"] = "row",
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str | None = None,
        rows: int | None = None,
        accuracies: list[list[float]] | None = None,
        decay: float = 0.8,
        random_cuts: bool = True,
        ensemble_mask: bool = True,
        weighting: Literal["mean", "learned"] = "mean",
        sparse: Literal["dynamic", "full", "random"] = "dynamic",
        divergence: str = "forward_kl",
    ) -> None:
        refuse_unknown("weighting", weighting, ("mean", "learned"))
        refuse_unknown("sparse", sparse, tuple(SPARSE))
        counts = {"prompts": prompts, "ensemble": ensemble, "groups": groups}
        for name, count in counts.items():
            if count < 1 or (name != "groups" and count > MOST_EMBEDDINGS):
                raise ValueError(f"{name} must be from 1 to {MOST_EMBEDDINGS}, got {count}")
        super().__init__(
            shape, prompts, ensemble, draft_vocabulary, decay, labels, groups_per, accuracies, rows
        )
        self.use_divergence(divergence)
        self.text, self.groups, self.random_cuts = text, groups, random_cuts
        self.sees: Sees = "chain" if ensemble_mask else "all"
        self.make_trees = SPARSE[sparse]
        # The softmax of the weights is the share of each member.
        learned = nn.Parameter(torch.zeros(ensemble)) if weighting == "learned" else None
        self.register_parameter("member_weights", learned)
        self.prompts_EH = nn.Parameter(0.02 * torch.randn(prompts * ensemble, shape.hidden_size))
        self.dynamic = tree is None
        self.use_static_tree("narrow" if tree is None else cast("list[Path] | str", tree))
        self.check_rows()

    @property
    def least_budget(self) -> int:
        """All prompt tokens of the root, and a draft with a prompt token of its own, or with all of
        them.
        """
        least = self.guesses if self.make_trees is whole_trees else 1
        return 1 + self.members * (least + self.guesses) if self.dynamic else 1

    def following(self, rows: Rows, counts_BN: Tensor, width: int) -> GuessRows:
        """The first `counts_BN` prompt tokens of each row."""
        return guess_rows(
            lambda _, entry_BP: self.prompts_EH[entry_BP],
            self.guesses,
            self.members,
            rows,
            counts_BN,
            width,
            self.sees,
        )

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the embeddings of a text's tokens, or draw some of the same size as the target's."""
        self.prompts_EH.copy_(started_embeddings(target, self.text, len(self.prompts_EH)))

    def head(self, depth: int, target: Target) -> Head:
        """The target's LM head on the states [..., X] of an ensemble: the mean of its members'
        logits, or their weighted sum.
        """
        members = (self.members, self.shape.hidden_size)
        weights = cast("nn.Parameter | None", self.member_weights)

        def combined(states: Tensor) -> Tensor:
            each = states.unflatten(-1, members)
            logits = target.logits(each, self.vocabulary_D, self.precision)
            if weights is None:
                return logits.mean(-2)
            return (logits * weights.softmax(0)[:, None].to(logits.dtype)).sum(-2)

        return combined

    def rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The tokens that prompt tokens follow."""
        return self.cuts(batch, self.groups)

    def weighted(self, steps: Iterable[DraftStep], batch: TextBatch) -> Losses:
        """The weighted mean over the prompt tokens."""
        losses = super().weighted(steps, batch)
        return replace(losses, total=losses.total / self.guesses)

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Adds a page of what calls of other sizes would give."""
        result = super().finish(batches, target)
        if not self.dynamic:
            return result
        pages = {"sparse_trees.md": predicted_page(self.accuracies, self.members)}
        return replace(result, pages=pages)

"""Parallel prompt decoding: trained embeddings after the newest token make the target's own pass
guess the tokens after the next one (Chen et al. 2024, arXiv 2405.18628).

Prompt token i after the token at position t has position t + i, and its final state gives the
logits of x_{t+1+i}; draft step d is prompt token d + 1. Tokens never see prompt tokens, so the
target's own logits do not change.

Shape legend: B sequences, T tokens of a packed row, N nodes, W frontier nodes, M training rows, P
prompt rows, K prompt tokens, E their embeddings, H hidden size, X concatenated states of an
ensemble, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import rows_at
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.trainable import Footprint, GradientLayers, TrainingResult
from modules.contracts.verification import Accepted, Verified
from modules.drafters.heads.base import refuse_unknown, soft_labels
from modules.drafters.prompt_tokens.dynamic_tree import drafted
from modules.drafters.prompt_tokens.prompt_rows import HostCounts, PromptRows, prompt_rows
from modules.drafters.prompt_tokens.sparse_tree import (
    SparseTrees,
    assumed,
    descending,
    predicted_page,
    sparse_trees,
)
from modules.drafters.trained import DraftStep, TrainedDrafter, measured_accuracies
from modules.losses.chunked import Head, TrainingRows, training_rows
from modules.losses.divergences import forward_kl
from modules.losses.row_subsets import some_rows
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target

MOST_EMBEDDINGS = 64
"""Limit on the prompt tokens, and on the embeddings of each."""
MEASURED_GROUPS = 128
"""Cuts of a row or document that accuracies are measured at."""
NARROW_ROWS, WIDE_ROWS = 12, 64
"""Rows of a call with a dynamic sparse tree, by default on a CPU and on a GPU."""


@dataclass
class PromptState(DraftState):
    """State of the prompt tokens after the last accepted node.

    final_BKX: their final states; None: there were none.
    available: the number of them that the node had.
    """

    final_BKX: Tensor | None
    available: HostCounts


class PPD(TrainedDrafter):
    """Prompt tokens on a frozen target: only their embeddings are trained.

    Loss: (1/m) Σ_i decay^i KL(p_i ‖ q_i), with q_i the distribution of prompt token i and p_i
    the target's own after the text. The paper lets the target continue greedily from a cut; here
    the text of the data continues, best the target's own answers (`python -m data.regenerate`), so
    that one pass trains many cuts.

    The first call after the prompt verifies only the newest token, followed by prompt tokens. It
    gives a token and the first guesses; a pass of prompt tokens alone would give only guesses.
    There is no combination with a draft model.

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
        draft_vocabulary: how many token ids can be drafted; null for all.
        tree: paths, or a name of `modules.trees.named_trees`; null is the dynamic sparse tree.
        rows: of a call with a dynamic sparse tree: the newest token, drafts and prompt tokens; null
            is 12, on a GPU 64 (not measured there). The budget of an evaluation is one less.
        accuracies: how often the rank-r token of each prompt token is right, which sparse trees are
            made from; filled in by `finish`.
        decay: prompt token i weighs decay^i.
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
    ) -> None:
        counts = {"prompts": prompts, "ensemble": ensemble, "groups": groups}
        for name, count in counts.items():
            if count < 1 or (name != "groups" and count > MOST_EMBEDDINGS):
                raise ValueError(f"{name} must be from 1 to {MOST_EMBEDDINGS}, got {count}")
        refuse_unknown("groups_per", groups_per, ("row", "document"))
        super().__init__(shape, prompts, draft_vocabulary, decay)
        self.soft_labels = soft_labels(labels)
        self.prompts, self.ensemble, self.text = prompts, ensemble, text
        self.groups, self.groups_per = groups, groups_per
        self.prompts_EH = nn.Parameter(0.02 * torch.randn(prompts * ensemble, shape.hidden_size))
        self.dynamic, self.call_rows = tree is None, rows
        self.use_static_tree("narrow" if tree is None else cast("list[Path] | str", tree))
        if accuracies is not None and len(accuracies) != prompts:
            raise ValueError(f"accuracies has {len(accuracies)} rows for {prompts} prompt tokens")
        self.accuracies = assumed(prompts) if accuracies is None else descending(accuracies)
        if rows is not None and rows <= self.least_budget:
            raise ValueError(f"rows must be at least {self.least_budget + 1}, got {rows}")

    @property
    def max_depth(self) -> int:
        """One level per prompt token."""
        return self.prompts

    @property
    def least_budget(self) -> int:
        """All prompt tokens of the root, and a draft with a prompt token of its own."""
        return 1 + self.ensemble * (1 + self.prompts) if self.dynamic else 1

    @property
    def default_budget(self) -> int:
        """Rows beside the newest token's where the tree is dynamic, prompt tokens included; drafted
        nodes of others.
        """
        if not self.dynamic:
            return super().default_budget
        rows = self.call_rows or (WIDE_ROWS if self.on_gpu else NARROW_ROWS)
        return max(rows - 1, self.least_budget)

    def sparse_trees(self, budget: int) -> SparseTrees:
        """The trees of all states for calls of so many rows beside the newest token's."""
        table = tuple(row[: self.draft_size] for row in self.accuracies)
        return sparse_trees(table, budget + 1, self.ensemble)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the embeddings of a text's tokens, or draw some of the same size as the target's."""
        text = self.text or ""
        listed = target.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids = torch.tensor(listed, dtype=torch.long)
        if len(ids):
            repeated = ids.repeat(-(-len(self.prompts_EH) // len(ids)))[: len(self.prompts_EH)]
            self.prompts_EH.copy_(target.embed(repeated.to(target.device)))
            return
        some = torch.arange(min(1024, self.shape.vocab_size), device=target.device)
        self.prompts_EH.normal_(0, float(target.embed(some).float().std()))

    def head(self, depth: int, target: Target) -> Head:
        """The target's LM head on the states [..., X] of an ensemble: the mean of its members'
        logits.
        """
        members = (self.ensemble, self.shape.hidden_size)

        def logits(states: Tensor) -> Tensor:
            each = states.unflatten(-1, members)
            return target.logits(each, self.vocabulary_D, self.precision).mean(-2)

        return logits

    # -- training ----------------------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """True: prompt tokens pass through the target in every step."""
        return True

    def footprint(self, rows: int, length: int) -> Footprint:
        """Adds the target's layers, through which prompt rows have a gradient."""
        layers = GradientLayers(self.shape, adapted=True)
        return replace(super().footprint(rows, length), layers=layers)

    def divergence(self, logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
        """KL(p‖q) per row [M]."""
        return forward_kl(logits_MD, probs_MD)

    def rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The tokens that prompt tokens follow: random ones in training, otherwise evenly
        spaced.
        """
        return self.cuts(batch, self.groups)

    def measured_rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """More of them than in training, without a gradient."""
        return self.cuts(batch, max(self.groups, MEASURED_GROUPS))

    def cuts(self, batch: TextBatch, most: int) -> TrainingRows:
        """Up to so many of every packed row or document."""
        rows = training_rows(batch, self.draft_steps)
        return some_rows(rows, batch, most, self.groups_per == "document", self.training)

    def passed(self, batch: TextBatch, target: Target, rows: TrainingRows) -> tuple[Tensor, Tensor]:
        """One pass: final states of the text [B,T,H] and of the prompt tokens [M,K,X]."""
        batch_size, length = batch.input_ids.shape
        flat_M = rows.flat_MK1[:, 0]
        # 1. Prompt tokens after every chosen token.
        counts_BT = torch.zeros_like(batch.input_ids)
        counts_BT.view(-1)[flat_M] = self.prompts
        width = max(1, int(counts_BT.sum(1).max()) * self.ensemble)
        appended = prompt_rows(self.prompts_EH, self.ensemble, batch.rows(), counts_BT, width)
        last = target.max_positions - 1
        appended = replace(appended, position_ids_BP=appended.position_ids_BP.clamp(max=last))
        # 2. The target reads both, at its own precision.
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            final = target.features(
                batch, ("final",), gradient=torch.is_grad_enabled(), auxiliary=appended
            )["final"]
        # 3. The states after each chosen token.
        assert appended.first_BN is not None
        entries = torch.arange(len(self.prompts_EH), device=flat_M.device)
        index_ME = appended.first_BN.flatten()[flat_M][:, None] + entries
        index_ME = index_ME + (flat_M // length)[:, None] * width
        states_MEH = final[:, length:].flatten(0, 1)[index_ME]
        return final[:, :length].detach(), self.side_by_side(states_MEH)

    def side_by_side(self, states: Tensor) -> Tensor:
        """States [...,E,H] as [...,K,X]: those of an ensemble in one row."""
        return states.unflatten(-2, (self.prompts, self.ensemble)).flatten(-2)

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,X], prompt token by prompt token."""
        yield from self.passed(batch, target, rows)[1].unbind(1)

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """Every prompt token over the chosen rows, with the target's distributions of the same
        pass.
        """
        rows = self.rows(batch, target)
        final_BTH, states_MKX = self.passed(batch, target, rows)
        batch = replace(batch, states={"final": final_BTH})
        outputs = ((state, state) for state in states_MKX.unbind(1))
        distributions = self.distributions(batch, target, rows)
        return self.scored(batch, target, rows, distributions, outputs)

    def weighted(self, steps: Iterable[DraftStep], batch: TextBatch) -> Losses:
        """The weighted mean over the prompt tokens."""
        losses = super().weighted(steps, batch)
        return replace(losses, total=losses.total / self.prompts)

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Measure how often each rank is right, for the sparse trees."""
        if not self.dynamic:
            return super().finish(batches, target)
        table = measured_accuracies(self, batches, target).tolist()
        self.accuracies = descending(table)
        self.arguments["accuracies"] = [list(row) for row in self.accuracies]
        expected = self.sparse_trees(self.default_budget).tokens
        page = predicted_page(self.accuracies, self.ensemble)
        return TrainingResult({"tree/expected_tokens": expected}, {"sparse_trees.md": page})

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The final state, which the LM head reads."""
        return ("final",)

    def start(self, context: Context) -> PromptState:
        """State before any prompt token was read."""
        none = HostCounts([0] * len(context.newest_B))
        return PromptState(context, context.newest_B, context.lengths_B, None, none)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The sparse tree of each sequence's state, or the fixed one that was asked for; without
        guesses only the newest token.
        """
        assert isinstance(state, PromptState)
        if state.final_BKX is None:
            return TokenTree.root(state.newest_B)
        if not self.dynamic:
            return super().propose(state, budget)
        # 1. The likeliest tokens of every level that a tree has.
        trees, count = self.sparse_trees(budget), max(1, *state.available)
        logits_BKD = self.head(0, state.context.target)(state.final_BKX[:, :count])
        tokens_BKR = logits_BKD.topk(trees.ranks, dim=-1).indices
        if self.vocabulary_D is not None:
            tokens_BKR = self.vocabulary_D[tokens_BKR]
        # 2. The tree of each sequence, and its prompt tokens.
        tree, counts_BN, counts = drafted(trees, state.available, state.newest_B, tokens_BKR)
        tree = replace(tree, vocabulary_D=self.vocabulary_D)
        return self.with_prompts(state, tree, counts_BN, counts)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D], the same for every node of a depth; uniform without guesses."""
        assert isinstance(state, PromptState)
        width = frontier.tokens_BW.shape[1]
        if state.final_BKX is None:
            nothing = torch.zeros(1, 1, 1, device=state.newest_B.device, dtype=self.precision)
            return nothing.expand(len(state.newest_B), width, self.draft_size)
        logits_BD = self.head(frontier.depth, state.context.target)(
            state.final_BKX[:, frontier.depth]
        )
        return logits_BD[:, None].expand(-1, width, -1)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree with all prompt tokens after every node, unless it has some."""
        if tree.auxiliary is not None:
            return tree
        everywhere = ((self.prompts,) * tree.size,) * len(tree.tokens_BN)
        counts_BN = torch.full_like(tree.tokens_BN, self.prompts)
        return self.with_prompts(state, tree, counts_BN, everywhere)

    def with_prompts(
        self,
        state: DraftState,
        tree: TokenTree,
        counts_BN: Tensor,
        counts: tuple[tuple[int, ...], ...],
    ) -> TokenTree:
        """The tree with so many prompt tokens after each node (`counts`: the same on the host)."""
        width = self.ensemble * max(map(sum, counts))
        rows = tree.rows(state.lengths_B)
        appended = prompt_rows(self.prompts_EH, self.ensemble, rows, counts_BN, width)
        return replace(tree, auxiliary=replace(appended, counts=counts))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> PromptState:
        """State with the prompt tokens of the last accepted node."""
        after, appended = super().absorb(state, verified, accepted), verified.tree.auxiliary
        assert isinstance(after, PromptState)
        if not isinstance(appended, PromptRows) or appended.first_BN is None:
            return replace(after, final_BKX=None, available=HostCounts([0] * len(accepted.paths)))
        # Prompt rows of the next node follow; `available` excludes them.
        states = verified.auxiliary_states["final"]
        entries = torch.arange(len(self.prompts_EH), device=states.device)
        first_B1 = appended.first_BN.gather(1, accepted.last_B[:, None])
        final_BEH = rows_at(states, (first_B1 + entries).clamp(max=states.shape[1] - 1))
        available = HostCounts(
            counts[path[-1]] for counts, path in zip(appended.counts, accepted.paths, strict=True)
        )
        return replace(after, final_BKX=self.side_by_side(final_BEH), available=available)

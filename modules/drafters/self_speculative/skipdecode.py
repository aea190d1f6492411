"""SkipDecode: later positions run fewer layers, and skip those above the first ones (Del Corro et
al. 2023, arXiv 2307.02628).

A position t runs the first w layers and the last k_t − w; k_t falls linearly with t. Budgets depend
on positions alone, so all sequences of a batch run the same layers, and no keys or values are ever
missing. The paper decodes with the tuned model, which is lossy (`scheduled_decoding.py`). Here it
also drafts for the target, which verifies with all layers.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, W frontier nodes, M
training rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.target import Session
from modules.contracts.token_tree import TokenTree
from modules.contracts.trainable import Footprint, GradientLayers
from modules.contracts.verification import Accepted, Verified
from modules.drafters.heads.base import refuse_unknown, soft_labels
from modules.drafters.self_speculative.base import SelfSpeculative, SelfState
from modules.drafters.self_speculative.schedule import Schedule, run_sliced, schedule_positions
from modules.drafters.self_speculative.tuning import LowRankTuning, WholeTuning
from modules.drafters.small_models.own_cache import OwnCacheState
from modules.drafters.trained import CHEAP_BUDGET, DraftStep, final_states
from modules.losses.chunked import Head, TrainingRows
from modules.target.hf_models import dict_of_config
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class ScheduledState(OwnCacheState):
    """State of a tuned model, which has a KV cache of its own.

    offset_B: int64 [B], position t of the schedule less the position in the sequence.
    """

    offset_B: Tensor = field(kw_only=True)

    def time(self) -> int:
        """Position t of the first token that the cache lacks, the earliest of the sequences."""
        return int((self.session.lengths_B + self.offset_B).min())


class SkipDecode(SelfSpeculative):
    """A target with a schedule of layer budgets, tuned for it.

    Loss: the cross-entropy of the next token at the last layer, every layer run over its active
    positions alone.

    As a draft it is lossless. Without tuning its layers are the target's: it reads the target's
    keys and values of the text (of all layers), and the first w layers of a drafted row run once
    for drafting and verification. Tuned weights give other keys and values in every layer, so the
    tuned model keeps a KV cache of its own, which it fills as its schedule says, and nothing is
    shared. A level of a tree runs at the budget of the sequence that is least far.

    Args:
        shape: the target's dimensions (Llama-type layers only for adapters).
        most, least: k_max and k_min: above 1 layers, up to 1 a share of the target's.
        length: S, positions after which k_t is k_min.
        warm_up: w, first layers that every position runs.
        budgets: k_t position by position in place of the three above, never increasing.
        prompt: `full` runs all layers over the prompt, and t counts from the first token of the
            answer; `scheduled` counts from the start of the text.
        tuning: `lora` trains adapters on every linear layer, `full` a copy of all weights; `none`
            skips layers of the target as it is, which needs no training.
        rank, alpha, dropout: of the adapters.
        labels: `hard`, the text's tokens (the paper), or `soft`, the target's distribution of them.
        draft_vocabulary: how many token ids can be drafted; null for all. The tuned model alone
            decodes with all of them.
        draft_length: tokens of a chain.
        model: config of the copy; filled in by `initialise`.
    """

    def __init__(
        self,
        shape: TargetShape,
        most: float = 0.75,
        least: float = 0.25,
        length: int = 256,
        warm_up: int = 1,
        budgets: list[int] | None = None,
        prompt: Literal["full", "scheduled"] = "full",
        tuning: Literal["lora", "full", "none"] = "lora",
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        labels: Literal["hard", "soft"] = "hard",
        draft_vocabulary: int | None = None,
        draft_length: int = 3,
        model: dict[str, Any] | None = None,
    ) -> None:
        # 1. Check the settings.
        refuse_unknown("prompt", prompt, ("full", "scheduled"))
        refuse_unknown("tuning", tuning, ("lora", "full", "none"))
        if draft_length < 1:
            raise ValueError(f"draft_length must be at least 1, got {draft_length}")
        super().__init__(shape, 1, draft_vocabulary, decay=1.0)
        self.schedule = (
            Schedule.linear(shape.num_layers, warm_up, most, least, length)
            if budgets is None
            else Schedule(shape.num_layers, warm_up, tuple(budgets))
        )
        self.whole_prompt, self.soft_labels = prompt == "full", soft_labels(labels)
        self.groups = list(self.schedule.groups(self.whole_prompt))
        # 2. What is tuned; layers that never run learn nothing.
        self.tuned: LowRankTuning | WholeTuning | None = None
        if tuning == "lora":
            self.tuned = LowRankTuning(shape, rank, alpha, dropout, name="skipdecode")
        elif tuning == "full":
            self.tuned = WholeTuning(shape, model)
        self._freeze()
        # 3. A chain of drafts.
        self._builder = StaticTree.chain(draft_length)
        self._budget = max(CHEAP_BUDGET, draft_length)

    def _freeze(self) -> None:
        if self.tuned is not None:
            self.tuned.freeze(range(self.schedule.warm_up, self.groups[0][0]))

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the target's weights where all are tuned, and store their config."""
        if isinstance(self.tuned, LowRankTuning):
            self.tuned.refuse_other_layers(target)
        elif self.tuned is not None:
            self.arguments |= {"model": dict_of_config(self.tuned.copy_from(target))}
            self._freeze()

    def model(self, target: Target, training: bool = False) -> Target:
        """The model whose layers draft: tuned, or the target."""
        return target if self.tuned is None else self.tuned.model(target, training)

    @property
    def precision(self) -> torch.dtype:
        """Dtype of the tuned weights; float32 without any."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    def head(self, depth: int, target: Target) -> Head:
        """The LM head of the tuned model; an adapted one has the target's."""
        model = self.model(target) if isinstance(self.tuned, WholeTuning) else target
        return lambda final: model.logits(final, self.vocabulary_D)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Adds the model's layers, which run with a gradient."""
        adapted = isinstance(self.tuned, LowRankTuning)
        dropout = adapted and self.arguments["dropout"] > 0
        layers = GradientLayers(self.shape, adapted=adapted, dropout=dropout)
        return replace(super().footprint(rows, length), layers=layers)

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """No cached states: the tuned model runs in every step."""
        return ()

    @property
    def online(self) -> bool:
        """True: the layers that it trains run in every step."""
        return True

    def sliced_states(self, batch: TextBatch, model: Target) -> Tensor:
        """The model's `final` states of a batch [B,T,H] under the schedule."""

        def run(rows: Rows, hidden_BNH: Tensor, start: int, stop: int) -> Tensor:
            layers, names = (start, stop), ("pre_norm",)
            return model.forward_rows(hidden_BNH, rows, names, layers=layers)["pre_norm"]

        firsts_BT = self.schedule.first_uppers(schedule_positions(batch, self.whole_prompt))
        embeddings, rows = model.embed(batch.input_ids), batch.rows()
        hidden = run_sliced(run, embeddings, rows, firsts_BT, self.schedule, self.groups)
        return model.final_norm(hidden)

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,H]: a single draft step."""
        if self.tuned is None:
            raise ValueError("tuning: none has nothing to train: use lora or full")
        final = self.sliced_states(batch, self.model(target, training=True))
        yield final.flatten(0, 1)[rows.flat_MK1[:, 1]]

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """The single step, with the target's states where its distributions are learnt."""
        if self.soft_labels and batch.teacher is None:
            batch = replace(batch, states={"final": final_states(batch, target)})
        return super().steps(batch, target)

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def shared_layers(self) -> int:
        """The warm-up layers, which no position skips."""
        return self.schedule.warm_up

    def start(self, context: Context) -> DraftState:
        """State after the prompt; a tuned model reads it into its own cache."""
        if self.tuned is None:
            return super().start(context)
        # 1. Positions of the schedule.
        lengths_B, count = context.lengths_B, context.input_ids_BT.shape[1]
        offset_B = self.offsets(lengths_B)
        # 2. The prompt, through all layers or as the schedule says.
        model = self.model(context.target)
        session = model.open(len(lengths_B), count + 64)
        self.prefill(session, context.input_ids_BT, lengths_B)
        return ScheduledState.begin(context, session, offset_B=offset_B)

    def offsets(self, lengths_B: Tensor) -> Tensor:
        """int64 [B]: position t of the schedule less the position in a sequence, for prompts of
        these lengths. A batch counts columns from the start of its longest prompt.
        """
        return -lengths_B if self.whole_prompt else lengths_B.max() - lengths_B

    def prefill(self, session: Session, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Read prompts into a session of the model: logits [B,V] after each one's last token."""
        if self.whole_prompt:
            return session.prefill(ids_BT, lengths_B)[0]
        # 1. Every layer over the columns where the schedule has it.
        batch, length = ids_BT.shape
        positions = torch.arange(length, device=ids_BT.device).expand(batch, -1)
        firsts_BT = self.schedule.first_uppers(positions + self.offsets(lengths_B)[:, None])

        def run(rows: Rows, hidden_BNH: Tensor, start: int, stop: int) -> Tensor:
            return session.run_layers(rows, hidden_BNH, start, stop)["pre_norm"]

        rows = TextBatch(ids_BT, ids_BT.bool(), positions, torch.zeros_like(ids_BT)).rows()
        model = session.target
        embeddings = model.embed(ids_BT)
        hidden = run_sliced(run, embeddings, rows, firsts_BT, self.schedule, self.groups)
        # 2. The tokens without padding are read.
        session.commit(Accepted(positions, lengths_B, lengths_B))
        last_BH = hidden[torch.arange(batch, device=ids_BT.device), lengths_B - 1]
        return model.logits(model.final_norm(last_BH))

    def run(self, state: SelfState, rows: Rows, embeddings_BWH: Tensor) -> tuple[Tensor, Tensor]:
        """States behind the warm-up layers, and behind the upper layers that the schedule leaves,
        on the target's own cache.
        """
        session, offset_B = state.session, self.offsets(state.context.lengths_B)
        t = int((rows.position_ids_BN[:, 0] + offset_B).min())
        reached = session.run_layers(rows, embeddings_BWH, 0, self.shared_layers)["pre_norm"]
        return reached, self.upper_states(session, rows, reached, t)

    def upper_states(self, session: Session, rows: Rows, reached_BNH: Tensor, t: int) -> Tensor:
        """`final` states [B,N,H] of rows at position t that have run the warm-up layers."""
        first, layers = self.schedule.first_upper(t), self.schedule.layers
        return session.run_layers(rows, reached_BNH, first, layers, ("final",))["final"]

    def scheduled_states(self, session: Session, ids_BN: Tensor, rows: Rows, t: int) -> Tensor:
        """`final` states [B,N,H] of tokens at position t, whatever their own one is."""
        embeddings = session.target.embed(ids_BN)
        reached = session.run_layers(rows, embeddings, 0, self.shared_layers)["pre_norm"]
        return self.upper_states(session, rows, reached, t)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,V] of the token after each frontier node."""
        if not isinstance(state, ScheduledState):
            return super().expand(state, frontier)
        # The text is read at the budget of the first unread token.
        t = state.time() + max(0, frontier.depth - 1)

        def read(ids_BN: Tensor, rows: Rows) -> Tensor:
            return self.scheduled_states(state.session, ids_BN, rows, t)

        return self.head(frontier.depth, state.context.target)(state.states(frontier, read))

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree, with the rows that have run layers of the target."""
        return tree if isinstance(state, ScheduledState) else super().prepare(state, tree)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State after a verification."""
        if isinstance(state, ScheduledState):
            return state.after(verified, accepted)
        return super().absorb(state, verified, accepted)

"""Prompt tokens on a draft model: it drafts its chains by parallel prompt decoding of its own
(Chen et al. 2024, arXiv 2405.18628: PPD combined with speculative decoding).

The chain is the one that `Independent` drafts token by token: the draft model verifies what its
prompt tokens guess, greedily. Several of its tokens may come from one of its calls.

Shape legend: B sequences, N nodes or rows, U unread tokens, G drafted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from modules.acceptance.rules import longest_path
from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, proposal
from modules.contracts.losses import Losses
from modules.contracts.sampling import likeliest
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.target import Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.trainable import TrainingResult
from modules.contracts.verification import Accepted, Verified
from modules.drafters.same_pass.base import GuessState
from modules.drafters.same_pass.guess_rows import HostCounts
from modules.drafters.same_pass.ppd import PPD
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.own_cache import OwnCacheState, appended_tokens
from modules.target.kernels.cpu_kernels import narrow_linear
from modules.target.target import Target as LoadedTarget


class HeadRead(LoadedTarget):
    """A language model whose LM head is never called: its weights are read, because processes
    compute logits of unequally many parts of rows (`Independent.head`).
    """

    def logits(
        self,
        hidden: Tensor,
        vocabulary_D: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """The same as `Target.logits`, by other means."""
        head = self.architecture.head
        if vocabulary_D is not None or not isinstance(head, nn.Linear):
            return super().logits(hidden, vocabulary_D, precision)
        return self.capped(narrow_linear(hidden.to(self.dtype), head.weight, head.bias))


@dataclass
class PromptedState(OwnCacheState):
    """State of the draft model's sequences.

    ahead_BG, ahead_counts_B: drafted tokens that its cache holds behind the text. calls: of the
    draft model so far.
    """

    ahead_BG: Tensor | None = None
    ahead_counts_B: Tensor | None = None
    calls: int = 0


class PromptedIndependent(Independent):
    """A draft model with prompt tokens. Only these are trained, on the draft model's own
    distributions (`PPD`); the model starts as `Independent` does, or from a trained one with
    `--init_from`.

    Args:
        shape, model, layers, draft_vocabulary, draft_length, tokenizer: as in `Independent`.
        prompts, ensemble, text, labels, groups, groups_per, decay: as in `PPD`.
        rows: of a call of the draft model: its newest token, guesses and prompt tokens; null is
            12, on a GPU 64.
        accuracies: how often the rank-r token of each prompt token is the draft model's own; filled
            in by `finish`.
    """

    runner_type = HeadRead

    def __init__(
        self,
        shape: TargetShape,
        model: str | dict[str, Any] | None = None,
        layers: int | None = None,
        draft_vocabulary: int | None = None,
        draft_length: int = 5,
        prompts: int = 3,
        ensemble: int = 1,
        text: str | None = "The next words of the answer are",
        labels: Literal["soft", "hard"] = "soft",
        groups: int = 32,
        groups_per: Literal["row", "document"] = "row",
        decay: float = 0.8,
        rows: int | None = None,
        accuracies: list[list[float]] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(
            shape,
            model,
            layers,
            draft_vocabulary,
            draft_length=draft_length,
            tokenizer=tokenizer,
        )
        self.draft_length = draft_length
        self.prompts = PPD(
            self.language_model.shape,
            prompts,
            ensemble,
            text,
            labels,
            groups,
            groups_per,
            draft_vocabulary,
            rows=rows,
            accuracies=accuracies,
            decay=decay,
        )

    def _adopt(self, model: Any) -> None:
        super()._adopt(model)
        model.requires_grad_(False)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Load the model's weights, and start the prompt tokens as a text that it reads."""
        super().initialise(target)
        self.language_model.tokenizer = target.tokenizer
        self.prompts.initialise(self.language_model)

    def set_vocabulary(self, ids: Any) -> None:
        """As `TokenDrafter.set_vocabulary`; the prompt tokens guess the same tokens."""
        super().set_vocabulary(ids)
        self.prompts.set_vocabulary(ids)

    # -- training ----------------------------------------------------------------------------------

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """None: the draft model learns nothing of the target."""
        return ()

    @property
    def online(self) -> bool:
        """True: prompt tokens pass through the draft model in every step."""
        return True

    @property
    def uneven_calls(self) -> str:
        """Empty: processes call its modules equally often."""
        return ""

    def own_batch(self, batch: TextBatch) -> TextBatch:
        """The batch as the draft model reads it, without what the target computed."""
        return replace(batch, input_ids=self.read_ids(batch.input_ids), states={}, teacher=None)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The loss of the prompt tokens, with the draft model as their target."""
        return self.prompts.loss(self.own_batch(batch), self.language_model, progress)

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Measure how often each rank is right, for the sparse trees."""
        result = self.prompts.finish(map(self.own_batch, batches), self.language_model)
        self.arguments["accuracies"] = self.prompts.arguments["accuracies"]
        return result

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> PromptedState:
        """State with the whole prompt unread; the first draft reads it."""
        room = context.input_ids_BT.shape[1] + 64
        session = self.language_model.open(len(context.newest_B), room)
        return PromptedState.begin(context, session)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The draft model's greedy chain, of at most `draft_length` tokens."""
        assert isinstance(state, PromptedState)
        length = max(1, min(self.draft_length, budget))
        # 1. Read the text, which gives the first draft and guesses of the next ones.
        guesses, tokens_BG = self._read_behind(state)
        counts_B = torch.ones_like(state.newest_B)
        # 2. Verify guesses until every sequence has a chain.
        while int(counts_B.min()) < length:
            tree = proposal(self.prompts, guesses, self.prompts.default_budget)
            guesses, accepted = self._verified(state, guesses, tree)
            tokens_BG, counts_B = appended_tokens(
                tokens_BG, counts_B, accepted.emitted(tree), accepted.lengths_B
            )
        # 3. The cache holds all but the last of them.
        state.ahead_BG, state.ahead_counts_B = tokens_BG[:, :-1], counts_B - 1
        chain = torch.cat([state.newest_B[:, None], tokens_BG[:, :length]], dim=1)
        return TokenTree.chain(chain, vocabulary_D=self.vocabulary_D)

    def _read_behind(self, state: PromptedState) -> tuple[GuessState, Tensor]:
        """Read the unread tokens, prompt tokens behind the last: the guesses, and the first draft
        [B,1].
        """
        context = replace(state.context, target=self.language_model)
        lengths_B, counts_B = state.session.lengths_B, state.unread_counts_B
        none = HostCounts([0] * len(counts_B))
        guesses = GuessState(context, state.newest_B, lengths_B, None, none)
        # Prompt tokens follow the last token of each sequence only.
        tree = TokenTree.chain(state.unread_BP)
        nodes = torch.arange(tree.size, device=counts_B.device)
        prompts_BN = self.prompts.guesses * (nodes == counts_B[:, None] - 1)
        on_host = tuple(map(tuple, prompts_BN.tolist()))
        tree = self.prompts.with_guesses(guesses, tree, prompts_BN, on_host)
        guesses, accepted = self._verified(state, guesses, tree, counts_B)
        state.unread_BP, state.unread_counts_B = state.unread_BP[:, :0], 0 * counts_B
        return guesses, accepted.next_B[:, None]

    def _verified(
        self,
        state: PromptedState,
        guesses: GuessState,
        tree: TokenTree,
        counts_B: Tensor | None = None,
    ) -> tuple[GuessState, Accepted]:
        """One call of the draft model over a tree, which keeps its own likeliest tokens, or the
        first `counts_B` of a chain of the text.
        """
        state.calls += 1
        state.session.reserve(tree.computed)
        read = replace(tree, tokens_BN=self.read_ids(tree.tokens_BN))
        verified = state.session.verify(read, ("final",), self.tokens_D)
        choice_BN = likeliest(verified.logits_BNV)
        choice_BN = choice_BN if self.tokens_D is None else self.tokens_D[choice_BN]
        if counts_B is None:
            wanted_BN = choice_BN.gather(1, tree.parents_BN.clamp(min=0))
            accepted = longest_path(tree, tree.tokens_BN == wanted_BN, choice_BN)
        else:
            order = torch.arange(tree.size, device=counts_B.device).expand_as(choice_BN)
            last_B = choice_BN.gather(1, counts_B[:, None] - 1)[:, 0]
            accepted = Accepted(order, counts_B, last_B)
        state.session.commit(accepted)
        return self.prompts.absorb(guesses, verified, accepted), accepted

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State whose cache holds what was accepted of the chain; other emitted tokens are
        unread.
        """
        assert isinstance(state, PromptedState)
        if state.ahead_BG is None or state.ahead_counts_B is None:
            return super().absorb(state, verified, accepted)
        # 1. Drafted tokens in the cache that are the text's.
        emitted_BA = accepted.emitted(verified.tree)
        width = min(emitted_BA.shape[1], state.ahead_BG.shape[1])
        places = torch.arange(width, device=emitted_BA.device)
        least_B1 = torch.minimum(accepted.lengths_B - 1, state.ahead_counts_B)[:, None]
        same = emitted_BA[:, :width] == state.ahead_BG[:, :width]
        held_B = (same & (places < least_B1)).int().cumprod(1).sum(1)
        # 2. Forget the others, and read what comes after these.
        state.session.rewind(state.session.lengths_B - state.ahead_counts_B + held_B)
        index = held_B[:, None] + torch.arange(emitted_BA.shape[1], device=held_B.device)
        later_BA = emitted_BA.gather(1, index.clamp(max=emitted_BA.shape[1] - 1))
        unread_BP, counts_B = appended_tokens(
            state.unread_BP, state.unread_counts_B, later_BA, accepted.lengths_B - held_B
        )
        return replace(
            cast(PromptedState, super().absorb(state, verified, accepted)),
            unread_BP=unread_BP,
            unread_counts_B=counts_B,
            ahead_BG=None,
            ahead_counts_B=None,
        )

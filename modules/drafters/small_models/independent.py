"""A small language model that drafts on its own: plain two-model speculative decoding.

Speculative decoding with a second model (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318), the drafter distilled from its target (DistillSpec, Zhou et al. 2023, arXiv
2310.08461; online speculative decoding, Liu et al. 2023, arXiv 2310.07177). The drafter is a stock
Hugging Face model behind the class that also runs the target.

Shape legend: B sequences, T tokens of a packed row or prompt, N rows of one call, M training rows,
W frontier nodes, H hidden size of the drafter, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses, Mean
from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.contracts.target import Target
from modules.contracts.trainable import Footprint, GradientLayers
from modules.contracts.verification import Accepted, Verified
from modules.drafters.small_models.on_policy import document_prompts, written
from modules.drafters.small_models.own_cache import OwnCacheState
from modules.drafters.small_models.vocabularies import TokenDrafter
from modules.drafters.trained import CHEAP_BUDGET, DraftStep, final_states
from modules.losses.chunked import Head, TrainingRows, accuracy, cross_entropy
from modules.losses.divergences import checked_divergence, total_variation
from modules.target.hf_models import (
    config_named,
    config_of_dict,
    config_of_shape,
    dict_of_config,
    fresh_model,
    load_named,
)
from modules.target.kernels.cpu_kernels import narrow_linear
from modules.target.target import Target as LoadedTarget
from modules.target.tokenizers.vocabulary import vocabulary_hash
from modules.trees.reranked import RerankedTree
from modules.trees.static import StaticTree


class Independent(TokenDrafter):
    """Any causal LM with the target's tokenizer as the drafter, with a KV cache of its own. Its
    embedding may have more or fewer rows than the target's: ids that both have are drafted.

    Loss: a divergence of its distribution q from the target's distribution p, at temperature 1. The
    KL and Jensen-Shannon divergences are of p renormalised over the draft vocabulary, mean over the
    assistant's tokens that can be drafted. The total variation is of p as it is, mean over all of
    the assistant's tokens: how often the ratio rule rejects a token drawn from q. Validation adds
    `acceptance_0`, Σ_v min(p, q) of p as it is, over all of them: how often that rule accepts one.
    What p has outside the draft vocabulary is rejected.

    Args:
        shape: the target's dimensions.
        model: initial weights: Hub id, folder or .gguf file of a causal LM; null for the target
            itself; a Hugging Face config (with `model_type`) for random weights. A saved drafter
            holds its config here.
        layers: number of first layers to use, with the embedding, the final norm and the LM head;
            null for all of a named model, and for an eighth of the target's, at least two.
        draft_vocabulary: how many token ids can be drafted; null for all that both models have.
            Only their LM-head rows are computed.
        divergence: `forward_kl`, `reverse_kl`, `kl_mixture`, `jensen_shannon`, `total_variation` or
            another of `modules.losses.divergences`.
        own_text: share of training batches whose answers the drafter generates itself (on-policy
            distillation).
        own_tokens: tokens that it then generates after each prompt.
        frozen_embedding: do not train the embedding, nor an LM head tied to it.
        draft_length: tokens of a chain, or levels of a tree.
        width: 1 drafts a chain; more, a tree that expands so many nodes per level (EAGLE-2's).
        tokenizer: hash of the vocabulary it reads; filled in by `initialise`.
    """

    own_model = True
    runner_type: ClassVar[type[LoadedTarget]] = LoadedTarget
    names_places = ("model",)
    soft_labels = True

    def __init__(
        self,
        shape: TargetShape,
        model: str | dict[str, Any] | None = None,
        layers: int | None = None,
        draft_vocabulary: int | None = None,
        divergence: str = "forward_kl",
        own_text: float = 0.0,
        own_tokens: int = 32,
        frozen_embedding: bool = False,
        draft_length: int = 3,
        width: int = 1,
        tokenizer: str | None = None,
    ) -> None:
        _check(divergence, own_text, own_tokens, draft_length, width)
        # 1. The model's config, without its weights.
        if isinstance(model, dict):
            config = config_of_dict(model, layers)
        else:
            config = (
                config_of_shape(shape, layers) if model is None else config_named(model, layers)
            )
        super().__init__(shape, config.vocab_size, draft_vocabulary)
        self.source, self.layers, self.frozen_embedding = model, layers, frozen_embedding
        self.use_divergence(divergence)
        self.own_text, self.own_tokens = own_text, own_tokens
        # A saved drafter is built on the caller's device; its loader builds it on meta first.
        with nullcontext() if isinstance(model, dict) else torch.device("meta"):
            self._adopt(fresh_model(config))
        # 2. A chain, or a tree of several nodes per level.
        self._builder = (
            StaticTree.chain(draft_length) if width == 1 else RerankedTree(draft_length, width)
        )
        self._budget = max(CHEAP_BUDGET, draft_length)

    def _adopt(self, model: Any) -> None:
        """Make this Hugging Face model the drafter's parameters, and run it as targets are run."""
        # A list hides the wrapper from nn.Module: its weights are those of `self.model`.
        self._runner: list[Target] = [self.runner_type(model, None, "drafter")]
        self.model = model.requires_grad_(True).train(self.training)
        model.get_input_embeddings().requires_grad_(not self.frozen_embedding)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Load the initial weights, and store the config and the tokenizer's hash as arguments.

        Raises:
            ValueError: a named model cannot be loaded, or its tokenizer is not the target's.
        """
        if not isinstance(self.source, dict):
            config, weights = load_named(self.source, self.layers, target)
            self._adopt(fresh_model(config))
            missing, _ = self.model.load_state_dict(weights, strict=False)
            assert not missing, missing
        self.source = dict_of_config(self.model.config)
        self.arguments |= {
            "model": self.source,
            "layers": None,
            "tokenizer": vocabulary_hash(target.tokenizer),
        }

    @property
    def language_model(self) -> Target:
        """The drafter's model behind the interface of targets (same weights)."""
        return self._runner[0]

    @property
    def stock(self) -> Any:
        """The Hugging Face model as its library runs it (same weights).

        `stock.save_pretrained(folder)` writes a standard folder. A trimmed draft vocabulary is not
        part of it: tokens outside were not trained to be unlikely.
        """
        return self.language_model.stock

    def head(self, depth: int, target: Target) -> Head:
        """Its own LM head: the rows of a trimmed vocabulary, or the first rows where it has more
        than the target.

        The weights are read and the module is never called, as ZeRO stage 3 requires
        (`modules.losses.chunked.LearntHead`).
        """
        model, lm_head = self.language_model, self.language_model.architecture.head

        def logits(hidden: Tensor) -> Tensor:
            if self.vocabulary is not None or not isinstance(lm_head, nn.Linear):
                return model.logits(hidden, self.vocabulary)
            return model.capped(narrow_linear(hidden.to(model.dtype), lm_head.weight, lm_head.bias))

        return lambda hidden: logits(hidden)[..., : self.draft_size]

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Adds the layers of its own model."""
        layers = GradientLayers(self.language_model.shape)
        return replace(super().footprint(rows, length), layers=layers)

    @property
    def online(self) -> bool:
        """Whether it generates text in training, which has no cached states."""
        return self.own_text > 0

    @property
    def uneven_calls(self) -> str:
        """Why processes may call modules unequally: each decides when to generate text."""
        return (
            f"drafter.own_text is {self.own_text}: processes write at different steps"
            if self.online
            else ""
        )

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,H]: a single draft step."""
        batch = replace(batch, input_ids=self.read_ids(batch.input_ids))
        final = self.language_model.features(batch, ("final",), gradient=torch.is_grad_enabled())[
            "final"
        ]
        yield final.flatten(0, 1)[rows.flat_MK1[:, 1]]

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The mean divergence; in validation also the expected acceptance."""
        if self.training and self.own_text:
            batch = self.own_or_given(batch)
        if batch.teacher is None:
            # The teacher's states are computed at the target's own precision.
            with torch.autocast(batch.input_ids.device.type, enabled=False):
                batch = replace(batch, states={"final": final_states(batch, target)})
        step = next(self.steps(batch, target))
        losses_M, counted_M = step.losses_M, step.counted_M
        metrics = {"top1_0": accuracy(step.ranks_M, step.valid_M, 1)}
        if not self.training:
            with torch.no_grad():
                accepted_M = (1 - self.rejected(step, batch, target)) * step.valid_M
            metrics["acceptance_0"] = Mean(accepted_M.sum(), step.valid_M.sum())
        metrics[f"{self.divergence_name}_0"] = Mean(losses_M.detach().sum(), counted_M.sum())
        return Losses(step.mean(losses_M), metrics)

    def rejected(self, step: DraftStep, batch: TextBatch, target: Target) -> Tensor:
        """1 − Σ_v min(p, q) [M], p not renormalised, in every row with a label, drafted or not."""
        distributions = step.distributions
        # p over a trimmed vocabulary sums to less than 1: the rest is always rejected.
        if self.vocabulary_D is not None or batch.teacher is not None:
            distributions = self.covered(batch, target, step.flat_M)
        return cross_entropy(
            step.feature_MH,
            self.head(0, target),
            step.labels_M,
            self.draft_size,
            distributions,
            step.flat_M,
            total_variation,
            counted_M=step.valid_M,
        )[0]

    def own_or_given(self, batch: TextBatch) -> TextBatch:
        """The batch, or with probability `own_text` its prompts with answers that the drafter
        generates now.
        """
        room = self.language_model.max_positions - self.own_tokens
        prompts = [
            self.read_ids(prompt) for prompt in document_prompts(batch) if len(prompt) <= room
        ]
        if not prompts or float(torch.rand(())) >= self.own_text:
            return batch
        return written(self.language_model, prompts, self.own_tokens, self.tokens_D)

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> OwnCacheState:
        """State with the whole prompt unread; the first draft reads it."""
        room = context.input_ids_BT.shape[1] + 64
        return OwnCacheState.begin(context, self.language_model.open(len(context.newest_B), room))

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node, all nodes of a level in one
        call.
        """
        assert isinstance(state, OwnCacheState)
        head = self.head(frontier.depth, state.context.target)

        def read(tokens_BN: Tensor, rows: Rows) -> Tensor:
            return state.session.read(self.read_ids(tokens_BN), rows)

        return head(state.states(frontier, read))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State with the emitted tokens unread; the drafted rows are dropped."""
        assert isinstance(state, OwnCacheState)
        return state.after(verified, accepted)


def _check(
    divergence: str, own_text: float, own_tokens: int, draft_length: int, width: int
) -> None:
    checked_divergence(divergence)
    if not 0 <= own_text <= 1:
        raise ValueError(f"own_text must lie between 0 and 1, got {own_text}")
    if min(own_tokens, draft_length, width) < 1:
        raise ValueError(
            "own_tokens, draft_length and width must be at least 1, got "
            f"{own_tokens}, {draft_length} and {width}"
        )

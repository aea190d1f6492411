"""Settings that change the target's distribution by the text before it, and ends of an answer.

Everything here is a `PrefixProcessor` or a function of the answer so far, so that a tree's node is
judged by its own path.

Shape legend: B sequences, N nodes, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from modules.contracts.sampling import Prefixes, PrefixProcessor, Sampling
from modules.contracts.token_tree import TokenTree


class OccurrencePenalty(LogitsProcessor):
    """Subtracts `presence` from the logits of tokens that occur in the answer, and `frequency` for
    each time that they do (OpenAI's presence and frequency penalties).

    Args:
        presence, frequency: the penalties.
        prompt_length: tokens before the answer.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [N,V] after the texts `input_ids` [N,T]."""
        answer_NT = input_ids[:, self.prompt_length :]
        times_NV = torch.zeros_like(scores).scatter_add_(
            1, answer_NT, torch.ones_like(answer_NT, dtype=scores.dtype)
        )
        return scores - self.frequency * times_NV - self.presence * (times_NV > 0)


class LibraryProcessors:
    """Hugging Face's logits processors after every prefix, those of one length together.

    Args:
        made: the processors for a prompt of that many tokens; their result after a text does not
            depend on earlier calls.
    """

    def __init__(self, made: Callable[[int], Sequence[LogitsProcessor]]) -> None:
        self._made = lru_cache(maxsize=None)(lambda length: LogitsProcessorList(made(length)))

    def __call__(self, logits_BNV: Tensor, prefixes: Sequence[Prefixes]) -> Tensor:
        """Processed logits [B,N,V], in float32 at least, as in `generate`."""
        flat_RV = logits_BNV.flatten(0, 1)
        wide_RV = flat_RV.to(torch.promote_types(flat_RV.dtype, torch.float32), copy=True)
        # 1. The text of every row; rows by the lengths of prompt and text.
        texts: list[list[int]] = []
        groups: dict[tuple[int, int], list[int]] = {}
        for each in prefixes:
            shared = [*each.prompt, *each.answer]
            for path in each.paths:
                texts.append([*shared, *path])
                groups.setdefault((len(each.prompt), len(texts[-1])), []).append(len(texts) - 1)
        # 2. One call per group.
        for (prompt_length, _), rows in groups.items():
            ids_NT = torch.tensor([texts[row] for row in rows], device=flat_RV.device)
            chain = self._made(prompt_length)
            wide_RV[rows] = torch.as_tensor(chain(cast(Any, ids_NT), cast(Any, wide_RV[rows])))
        return wide_RV.reshape(logits_BNV.shape)


def library_processors(
    sampling: Sampling, prompt_length: int, eos_ids: Collection[int], device: torch.device
) -> list[LogitsProcessor]:
    """The processors of these settings, in the order in which `generate` applies them.

    Args:
        sampling: the settings.
        prompt_length: tokens before the answer.
        eos_ids: tokens that end an answer; empty where no token does.
        device: of the logits.
    """
    chain: list[LogitsProcessor] = []
    if sampling.logit_bias:
        pairs = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        chain.append(SequenceBiasLogitsProcessor(cast(Any, pairs)))
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.min_new_tokens and eos_ids:
        chain.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_length, sampling.min_new_tokens, sorted(eos_ids), device=str(device)
            )
        )
    if sampling.suppress_tokens:
        chain.append(SuppressTokensLogitsProcessor(sampling.suppress_tokens, device=str(device)))
    return chain + occurrence_penalties(sampling, prompt_length)


def occurrence_penalties(sampling: Sampling, prompt_length: int) -> list[LogitsProcessor]:
    """Presence and frequency penalties, which `generate` has no settings for; empty without."""
    if not (sampling.presence_penalty or sampling.frequency_penalty):
        return []
    return [OccurrencePenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_length)]


def prefix_processors(
    sampling: Sampling, eos_ids: Collection[int], device: torch.device
) -> list[PrefixProcessor]:
    """What changes the target's distribution, in order; empty without such settings."""
    if not library_processors(sampling, 0, eos_ids, device):
        return []
    return [LibraryProcessors(lambda length: library_processors(sampling, length, eos_ids, device))]


def check_ids(sampling: Sampling, vocabulary: int) -> None:
    """ValueError for ids of tokens that a vocabulary of this size does not have."""
    for name in ("logit_bias", "suppress_tokens"):
        if (largest := max(getattr(sampling, name), default=0)) >= vocabulary:
            raise ValueError(
                f"{name} has token {largest}, beyond the vocabulary of {vocabulary}: give ids of "
                "this target's tokenizer"
            )


def check_constraints(sampling: Sampling, prompts: int) -> None:
    """ValueError for constraints of another number of prompts."""
    constraint = sampling.constraint
    if isinstance(constraint, Sequence) and len(constraint) != prompts:
        raise ValueError(
            f"constraint: {len(constraint)} constraints for {prompts} prompts: give one for all, "
            "or one for each"
        )


def node_paths(tree: TokenTree) -> list[list[list[int]]]:
    """The tokens from node 0 to each node, per sequence. Reads the device."""
    paths: list[list[list[int]]] = []
    parents_BN = tree.parents_BN.expand_as(tree.tokens_BN)
    for tokens, parents in zip(tree.tokens_BN.tolist(), parents_BN.tolist(), strict=True):
        above: list[list[int]] = []
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            above.append([*above[parent], token] if 0 <= parent < node else [token])
        paths.append(above)
    return paths


class StopStrings:
    """Finds where an answer first contains one of some texts.

    Args:
        texts: non-empty.
        decode: the text of token ids.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.texts, self._decode = texts, decode
        # A token is a byte at least; one more on the left keeps its leading space.
        self._most = max(len(text.encode()) for text in texts) + 1

    @staticmethod
    def of(texts: Sequence[str], tokenizer: Any) -> StopStrings | None:
        """For answers of this tokenizer; None without texts. Special tokens are text too."""

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        return StopStrings(texts, decode) if texts else None

    def end(self, ids: Sequence[int], start: int = 0) -> int | None:
        """How many tokens the answer has when it ends with the token that completes a text; None
        where none does. Tokens before `start` have been looked at."""
        for count in range(start + 1, len(ids) + 1):
            tail = self._decode(list(ids[max(0, count - self._most) : count]))
            if any(text in tail for text in self.texts):
                return count
        return None

"""The tokens of conversations, with a loss mask on what the assistant says.

Shape legend: T tokens of a document.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from data.rows import Conversation, Message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids int64 [T] and loss mask bool [T], true on the assistant's tokens."""

    input_ids: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    @property
    def response_tokens(self) -> int:
        """How many tokens are trained on."""
        return int(self.loss_mask.sum())

    @property
    def prompt(self) -> list[int]:
        """The ids before the assistant's first token."""
        return self.input_ids[:int(self.loss_mask.int().argmax())].tolist()

    @cached_property
    def key(self) -> str:
        """Hash of the token ids: what cached states are found by."""
        return hash_ids(self.input_ids)


def hash_ids(ids: Tensor | Sequence[int]) -> str:
    """128 bits of the SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(torch.as_tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()[:32]


class Skipped(ValueError):
    """A conversation that cannot be trained on; the message is the reason it is counted under."""


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a chat up to where the assistant is to speak."""
    return _encode(render(messages, tokenizer, generate=True), tokenizer)


def tokenize(conversation: Conversation, tokenizer: Any, max_length: int,
             end_ids: Collection[int] | None = None) -> Tokens:
    """Apply the target's chat template; the mask covers the assistant's tokens and the end-of-turn tokens it emits.

    Each turn is tokenised behind the previous ones as in decoding, so the prompt's tokens are exactly `prompt_ids`.
    A document longer than `max_length` loses its end. Turns behind a template that rewrites earlier ones are left out.

    Args:
        end_ids: tokens that end an answer (default: the tokenizer's EOS).

    Raises:
        Skipped: no assistant turn, a prompt that fills `max_length`, or a template that refuses the messages.
    """
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Skipped("no assistant turn")
    ends = frozenset(end_ids or {tokenizer.eos_token_id})
    ids: list[int] = []
    mask: list[bool] = []
    text = ""
    for turn in answers:
        prompt = render(messages[:turn], tokenizer, generate=True)
        through = render(messages[:turn + 1], tokenizer)
        if not prompt.startswith(text) or not through.startswith(prompt):
            break
        asked = _encode(prompt[len(text):], tokenizer)
        said, glue = _split_answer(_encode(through[len(prompt):], tokenizer), ends, tokenizer)
        if turn == len(messages) - 1:
            said, glue = _exact_answer(said, conversation, ends, tokenizer), []
        ids += asked + said + glue
        mask += [False] * len(asked) + [True] * len(said) + [False] * len(glue)
        text = through
        if len(ids) >= max_length:
            break
    return _document(ids, mask, max_length)


def _document(ids: list[int], mask: list[bool], max_length: int) -> Tokens:
    if not any(mask):
        raise Skipped("empty answers, or a chat template that rewrites earlier turns")
    last = max(i for i, masked in enumerate(mask) if masked) + 1
    if not any(mask[:max_length]):
        raise Skipped(f"prompt longer than the context ({max_length} tokens)")
    end = min(last, max_length)
    return Tokens(torch.tensor(ids[:end]), torch.tensor(mask[:end]))


def render(messages: Sequence[Message], tokenizer: Any, generate: bool = False) -> str:
    """A chat as the tokenizer's template writes it; `generate` opens the assistant's turn behind it.

    Raises ValueError for a tokenizer without a template, `Skipped` for messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned target")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise Skipped(f"refused by the chat template ({error})") from error


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _split_answer(ids: list[int], ends: Collection[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The answer through its end-of-turn token, and the template's glue behind it."""
    for stops in (ends, tokenizer.all_special_ids):
        for i, token in enumerate(ids):
            if token in stops:
                return ids[:i + 1], ids[i + 1:]
    return ids, []


def _exact_answer(said: list[int], conversation: Conversation, ends: Collection[int], tokenizer: Any) -> list[int]:
    """The last answer as it was generated: its recorded ids when they are this tokenizer's, no EOS if it was cut."""
    exact = conversation.response_ids
    content = conversation.messages[-1]["content"].strip()
    if exact and max(exact) < len(tokenizer) and _decode(exact, tokenizer).strip() == content:
        return exact
    cut = not conversation.finished and said and (said[-1] in ends or said[-1] in tokenizer.all_special_ids)
    return said[:-1] if cut else said


def _decode(ids: Iterable[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def tokenize_all(conversations: Iterable[Conversation], tokenizer: Any, max_length: int,
                 max_response_tokens: int | None = None, end_ids: Collection[int] | None = None) -> list[Tokens]:
    """Documents of all usable conversations in order, up to a budget of response tokens.

    Skips are counted by reason and logged. A document seen before (the same tokens) is kept once.

    Raises:
        ValueError: nothing is left.
    """
    documents: dict[str, Tokens] = {}
    skips: Counter[str] = Counter()
    spent = 0
    for conversation in conversations:
        if max_response_tokens is not None and spent >= max_response_tokens:
            break
        try:
            document = tokenize(conversation, tokenizer, max_length, end_ids)
        except Skipped as reason:
            skips[str(reason)] += 1
            continue
        if document.key in documents:
            skips["seen before"] += 1
            continue
        documents[document.key] = document
        spent += document.response_tokens
    for reason, count in skips.items():
        logger.warning("skipped %d conversation%s: %s", count, "s" * (count != 1), reason)
    if not documents:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skips.items()) or "it is empty"
        raise ValueError(f"no conversation of the data set can be trained on: {reasons}")
    return list(documents.values())

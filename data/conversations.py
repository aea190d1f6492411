"""The tokens of conversations, with a loss mask on what the assistant says.

Shape legend: T tokens of a document.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from data.chat_tokens import Answer, answer_ids
from data.chat_tokens import prompt_ids as prompt_ids
from data.reading.files import Place, Row, Skipped, Tally
from data.reading.rows import Conversation


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids int64 [T] and loss mask bool [T], true on the assistant's tokens.

    opening: hash of the prompt with which its conversation begins, where that has several
    documents. cut: whether its last answer goes on beyond `max_length`.
    """

    input_ids: Tensor
    loss_mask: Tensor
    opening: str | None = field(default=None, kw_only=True)
    cut: bool = field(default=False, kw_only=True)

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
        return self.input_ids[: int(self.loss_mask.int().argmax())].tolist()

    @cached_property
    def group(self) -> str:
        """Hash of the first prompt of its conversation: what is held out together."""
        return self.opening or hash_ids(self.prompt)

    @cached_property
    def key(self) -> str:
        """Hash of the token ids: what cached states are found by."""
        return hash_ids(self.input_ids)


def hash_ids(ids: Tensor | Sequence[int]) -> str:
    """128 bits of the SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(torch.as_tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()[
        :32
    ]


class Tokenized(NamedTuple):
    """A conversation's documents, and how many of its answers are in none of them, by reason."""

    documents: list[Tokens]
    left_out: Counter[str]


def tokenize(
    conversation: Conversation,
    tokenizer: Any,
    max_length: int,
    end_ids: Collection[int] | None = None,
) -> Tokenized:
    """Apply the target's chat template; the mask covers the assistant's tokens and the end-of-turn
    tokens it emits.

    The tokens before every answer are exactly its `prompt_ids`. All answers stand in one document
    as long as each prompt goes on from the answer before it; where a template rewrites earlier
    turns, an answer begins a document of its own. A document longer than `max_length` loses its
    end.

    Args:
        end_ids: tokens that end an answer (default: the tokenizer's EOS).

    Raises:
        Skipped: no assistant turn, or none that can be trained on; the first answer's reason.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not turns:
        raise Skipped("no assistant turn")
    ends = frozenset(end_ids or {tokenizer.eos_token_id})
    chains: list[list[Answer]] = []
    left_out: Counter[str] = Counter()
    for number, turn in enumerate(turns):
        try:
            answer = answer_ids(conversation, turn, tokenizer, ends)
        except Skipped as reason:
            left_out[str(reason)] += 1
            continue
        if len(answer.prompt) >= max_length:
            left_out[_too_long(max_length)] += len(turns) - number
            break
        if chains and _goes_on(answer, chains[-1][-1]):
            chains[-1].append(answer)
        else:
            chains.append([answer])
    if not chains:
        raise Skipped(next(iter(left_out)))
    opening = hash_ids(chains[0][0].prompt)
    return Tokenized([_document(chain, max_length, opening) for chain in chains], left_out)


def tokenize_answer(
    conversation: Conversation,
    tokenizer: Any,
    max_length: int,
    end_ids: Collection[int] | None = None,
) -> Tokens:
    """The last turn, which is the assistant's, behind its prompt; the mask is on this answer alone.

    Raises:
        Skipped: as `tokenize`, or a prompt that fills `max_length`.
    """
    ends = frozenset(end_ids or {tokenizer.eos_token_id})
    answer = answer_ids(conversation, len(conversation.messages) - 1, tokenizer, ends)
    if len(answer.prompt) >= max_length:
        raise Skipped(_too_long(max_length))
    return _document([answer], max_length)


def _too_long(max_length: int) -> str:
    return f"prompt longer than the context ({max_length} tokens)"


def _goes_on(answer: Answer, earlier: Answer) -> bool:
    """Whether an answer's prompt begins with an earlier answer and its prompt."""
    before = earlier.prompt + earlier.said
    return answer.prompt[: len(before)] == before


def _document(chain: Sequence[Answer], max_length: int, opening: str | None = None) -> Tokens:
    """Answers that go on from each other, the end cut off at `max_length`."""
    ids: list[int] = []
    mask: list[bool] = []
    for answer in chain:
        ids = answer.prompt + answer.said
        mask += [False] * (len(answer.prompt) - len(mask)) + [True] * len(answer.said)
    return Tokens(
        torch.tensor(ids[:max_length]),
        torch.tensor(mask[:max_length]),
        opening=opening,
        cut=len(ids) > max_length,
    )


def count_cut(
    documents: Iterable[Tokens], max_length: int, tally: Tally, place: Place | None
) -> None:
    """Count the answers whose end is not trained on, because it lies beyond `max_length`."""
    reason = f"cut off at data.max_length ({max_length} tokens)"
    tally.change_parts("answer", reason, place, sum(document.cut for document in documents))


def check_ids(ids: Tensor | Sequence[int], tokenizer: Any, rows: int | None) -> None:
    """Skipped: a token beyond the `rows` of the model's embedding, as of a tokenizer that was given
    tokens the model was not. Nothing is checked without `rows`."""
    largest = int(torch.as_tensor(ids).max())
    if rows is not None and largest >= rows:
        raise Skipped(
            f"token {largest} {tokenizer.convert_ids_to_tokens(largest)!r} is beyond the "
            f"model's vocabulary of {rows}"
        )


Example = TypeVar("Example")
Document = TypeVar("Document", bound=Any)
"""`Tokens`, or what has their `key` and `response_tokens`."""


def each_once(
    rows: Iterable[Row],
    read: Callable[[dict[str, Any]], list[Example]],
    tokenized: Callable[[Example], Document],
    budget: int | None,
    tally: Tally,
    taken: Callable[[Document, Place | None], None],
) -> dict[str, Document]:
    """Tokenized examples of all rows by their keys, in order, up to a budget of response tokens;
    skips are counted and logged.

    Args:
        rows: of a data set.
        read: the examples of a row's content; `Skipped` if there are none.
        tokenized: an example's tokens; `Skipped` if it cannot be used.
        budget: response tokens; None for all rows.
        tally: counts what is left out.
        taken: told of every document that is kept, and of its row's place.
    """
    documents: dict[str, Document] = {}
    spent = 0
    for row in rows:
        if budget is not None and spent >= budget:
            break
        try:
            examples = read(row.content)
        except Skipped as reason:
            tally.skip(str(reason), row.place)
            continue
        for example in examples:
            try:
                document = tokenized(example)
            except Skipped as reason:
                tally.skip(str(reason), row.place)
                continue
            if document.key not in documents:
                documents[document.key] = document
                spent += document.response_tokens
                taken(document, row.place)
    tally.log()
    return documents


def tokenize_all(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    max_length: int,
    max_response_tokens: int | None = None,
    end_ids: Collection[int] | None = None,
    rows: int | None = None,
    tally: Tally | None = None,
) -> list[Tokens]:
    """Documents of all usable conversations in order, up to a budget of response tokens.

    Conversations skipped and answers left out of others are counted by reason and logged. A
    document seen before (the same tokens) is kept once.

    Args:
        rows: of the model's embedding, see `check_ids`.
        tally: counts what is left out; it may hold rows that could not be read.

    Raises:
        ValueError: nothing is left.
    """
    documents: dict[str, Tokens] = {}
    tally = Tally("conversation") if tally is None else tally
    spent = 0
    for conversation in conversations:
        if max_response_tokens is not None and spent >= max_response_tokens:
            break
        try:
            found = tokenize(conversation, tokenizer, max_length, end_ids)
            for document in found.documents:
                check_ids(document.input_ids, tokenizer, rows)
            new = [document for document in found.documents if document.key not in documents]
            if not new:
                raise Skipped("seen before")
        except Skipped as reason:
            tally.skip(str(reason), conversation.place)
            continue
        for reason, count in found.left_out.items():
            tally.change_parts("answer", f"left out: {reason}", conversation.place, count)
        count_cut(new, max_length, tally, conversation.place)
        documents.update((document.key, document) for document in new)
        spent += sum(document.response_tokens for document in new)
    tally.log()
    if not documents:
        raise ValueError(f"no conversation of the data set can be trained on: {tally.reasons()}")
    return list(documents.values())

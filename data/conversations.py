"""The tokens of conversations, with a loss mask on the assistant's tokens.

Shape legend: T tokens of a document.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from data.chat_tokens import Answer, answer_ids, reasoning_length
from data.chat_tokens import prompt_ids as prompt_ids
from data.reading.files import Place, Row, Skipped, Tally
from data.reading.rows import Conversation

TrainOn = Literal["all", "last_turn", "answer_without_reasoning"]
"""Which of the assistant's tokens are trained on: all, those of its last turn, or all but those of
its reasoning, which stays before the answer."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids int64 [T] and loss mask bool [T], true on the assistant's tokens.

    opening: hash of the first prompt of its conversation, if that has several documents. cut:
    whether its last answer is truncated at `max_length`.
    """

    input_ids: Tensor
    loss_mask: Tensor
    opening: str | None = field(default=None, kw_only=True)
    cut: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        """The number of tokens T."""
        return self.input_ids.shape[0]

    @property
    def response_tokens(self) -> int:
        """The number of tokens that are trained on."""
        return int(self.loss_mask.sum())

    @property
    def prompt(self) -> list[int]:
        """The ids before the assistant's first token."""
        return self.input_ids[: int(self.loss_mask.int().argmax())].tolist()

    @cached_property
    def group(self) -> str:
        """Hash of its conversation's first prompt; documents of a group are held out together."""
        return self.opening or hash_ids(self.prompt)

    @cached_property
    def key(self) -> str:
        """Hash of the token ids, the key of cached states."""
        return hash_ids(self.input_ids)


def hash_ids(ids: Tensor | Sequence[int]) -> str:
    """128 bits of the SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(torch.as_tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()[
        :32
    ]


class Tokenized(NamedTuple):
    """A conversation's documents, and the number of its skipped answers by reason."""

    documents: list[Tokens]
    left_out: Counter[str]


def tokenize(
    conversation: Conversation,
    tokenizer: Any,
    max_length: int,
    end_ids: Collection[int] | None = None,
    train_on: TrainOn = "all",
) -> Tokenized:
    """Apply the target's chat template; the mask covers the assistant's tokens and its end-of-turn
    tokens. Turns of `weight` 0 are only read.

    The tokens before every answer are exactly its `prompt_ids`. All answers are in one document as
    long as each prompt continues the answer before it; where a template rewrites earlier turns, an
    answer begins a new document. Documents are truncated at `max_length`.

    Args:
        end_ids: tokens that end an answer (default: the tokenizer's EOS).
        train_on: which of them the mask covers.

    Raises:
        Skipped: no assistant turn, or none to train on, with the first answer's reason.
    """
    turns = _trained_turns(conversation, train_on)
    ends = frozenset(end_ids or {tokenizer.eos_token_id})
    # 1. Answers that continue each other form a chain, each with its number of unmasked tokens.
    chains: list[list[tuple[Answer, int]]] = []
    left_out: Counter[str] = Counter()
    for number, turn in enumerate(turns):
        try:
            answer = answer_ids(conversation, turn, tokenizer, ends)
        except Skipped as reason:
            left_out[str(reason)] += 1
            continue
        # Later prompts are longer still.
        if len(answer.prompt) >= max_length:
            left_out[_too_long(max_length)] += len(turns) - number
            break
        unmasked = 0
        if train_on == "answer_without_reasoning":
            unmasked = reasoning_length(conversation.messages[turn], answer.said, tokenizer)
        if len(answer.prompt) + unmasked >= max_length:
            left_out[f"nothing but reasoning within data.max_length ({max_length} tokens)"] += 1
        elif chains and _goes_on(answer, chains[-1][-1][0]):
            chains[-1].append((answer, unmasked))
        else:
            chains.append([(answer, unmasked)])
    if not chains:
        raise Skipped(next(iter(left_out)))
    # 2. A document per chain; all share the group of the first prompt.
    opening = hash_ids(chains[0][0][0].prompt)
    return Tokenized([_document(chain, max_length, opening) for chain in chains], left_out)


def _trained_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """The assistant's turns to train on. Raises Skipped without any."""
    turns = [i for i, turn in enumerate(conversation.messages) if turn["role"] == "assistant"]
    if not turns:
        raise Skipped("no assistant turn")
    trained = [i for i in turns if conversation.messages[i].get("weight", 1)]
    if not trained:
        raise Skipped("no assistant turn but those of `weight` 0")
    return trained[-1:] if train_on == "last_turn" else trained


def tokenize_answer(
    conversation: Conversation,
    tokenizer: Any,
    max_length: int,
    end_ids: Collection[int] | None = None,
) -> Tokens:
    """The last turn, which is the assistant's, after its prompt; the mask covers only this answer.

    Raises:
        Skipped: as `tokenize`, or a prompt that fills `max_length`.
    """
    ends = frozenset(end_ids or {tokenizer.eos_token_id})
    answer = answer_ids(conversation, len(conversation.messages) - 1, tokenizer, ends)
    if len(answer.prompt) >= max_length:
        raise Skipped(_too_long(max_length))
    return _document([(answer, 0)], max_length)


def _too_long(max_length: int) -> str:
    return f"prompt longer than the context ({max_length} tokens)"


def _goes_on(answer: Answer, earlier: Answer) -> bool:
    """Whether an answer's prompt begins with an earlier answer and its prompt."""
    before = earlier.prompt + earlier.said
    return answer.prompt[: len(before)] == before


def _document(
    chain: Sequence[tuple[Answer, int]], max_length: int, opening: str | None = None
) -> Tokens:
    """The document of answers that continue each other, each with the number of its tokens that the
    mask leaves out, truncated at `max_length`."""
    ids: list[int] = []
    mask: list[bool] = []
    for answer, unmasked in chain:
        ids = answer.prompt + answer.said
        mask += [False] * (len(answer.prompt) + unmasked - len(mask))
        mask += [True] * (len(answer.said) - unmasked)
    return Tokens(
        torch.tensor(ids[:max_length]),
        torch.tensor(mask[:max_length]),
        opening=opening,
        cut=len(ids) > max_length,
    )


def count_cut(
    documents: Iterable[Tokens], max_length: int, tally: Tally, place: Place | None
) -> None:
    """Count the answers that are truncated at `max_length`."""
    reason = f"cut off at data.max_length ({max_length} tokens)"
    tally.change_parts("answer", reason, place, sum(document.cut for document in documents))


def check_ids(ids: Tensor | Sequence[int], tokenizer: Any, rows: int | None) -> None:
    """Raise Skipped for a token beyond the `rows` of the model's embedding, as from a tokenizer
    with tokens that the model lacks. Nothing is checked without `rows`."""
    largest = int(torch.as_tensor(ids).max())
    if rows is not None and largest >= rows:
        raise Skipped(
            f"token {largest} {tokenizer.convert_ids_to_tokens(largest)!r} is beyond the "
            f"model's vocabulary of {rows}"
        )


Example = TypeVar("Example")
Document = TypeVar("Document", bound=Any)
"""`Tokens`, or another class with `key` and `response_tokens`."""


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
        read: returns the examples of a row's content; raises Skipped without any.
        tokenized: returns an example's tokens; raises Skipped if it cannot be used.
        budget: response tokens; None for all rows.
        tally: counts skipped rows.
        taken: called with every new document and its row's place.
    """
    documents: dict[str, Document] = {}
    spent = 0
    for row in rows:
        if budget is not None and spent >= budget:
            break
        # A row may hold several examples, each of which may be skipped.
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
    train_on: TrainOn = "all",
) -> list[Tokens]:
    """Documents of all usable conversations in order, up to a budget of response tokens.

    Skipped conversations and answers are counted by reason and logged. Documents with the same
    tokens are used once.

    Args:
        rows: of the model's embedding, see `check_ids`.
        tally: counts skipped rows; it may already hold unreadable ones.
        train_on: which of the assistant's tokens the mask covers.

    Raises:
        ValueError: no conversation can be used.
    """
    documents: dict[str, Tokens] = {}
    tally = Tally("conversation") if tally is None else tally
    spent = 0
    for conversation in conversations:
        if max_response_tokens is not None and spent >= max_response_tokens:
            break
        # All documents of a conversation, or a reason to skip it.
        try:
            tokenized = tokenize(conversation, tokenizer, max_length, end_ids, train_on)
            for document in tokenized.documents:
                check_ids(document.input_ids, tokenizer, rows)
            new = [document for document in tokenized.documents if document.key not in documents]
            if not new:
                raise Skipped("seen before")
        except Skipped as reason:
            tally.skip(str(reason), conversation.place)
            continue
        # Answers that are left out or truncated are counted apart from conversations.
        for reason, count in tokenized.left_out.items():
            tally.change_parts("answer", f"left out: {reason}", conversation.place, count)
        count_cut(new, max_length, tally, conversation.place)
        documents.update((document.key, document) for document in new)
        spent += sum(document.response_tokens for document in new)
    tally.log()
    if not documents:
        raise ValueError(f"no conversation of the data set can be trained on: {tally.reasons()}")
    return list(documents.values())

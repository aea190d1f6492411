"""Answers whose tokens are labelled right or wrong, as batches for training judges.

Shape legend: B rows, T tokens of a row or document.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.chat_tokens import answer_spans, prompt_ids
from data.conversations import Tokens, check_ids, count_cut, each_once, hash_ids
from data.corpora.word_problems import EMBEDDED_SOLUTIONS
from data.datamodule import Batches, ConversationData
from data.labelled.solution_errors import Problem, Span, inject, is_problem, read_problem
from data.reading.files import Place, Row, Skipped, Tally, read_rows
from data.reading.rows import TEMPLATE_ARGUMENTS, Message, opening_of, token_ids
from modules.contracts.batches import LabelledBatch, TextBatch

SHAPES = (
    "`question` with solutions known to be right or wrong, or `prompt` (text or messages), "
    "`response` and `spans` of [start, end, label]: of its characters, or of the tokens of "
    "`response_ids` where these are given"
)
LabelledSpan = tuple[int, int, int]
"""Characters (or tokens) of a response and their label: 1 right, 0 wrong."""


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with the characters that are known to be right or wrong; others have no label.

    ids: its tokens, if recorded (encoding the text may give other tokens); spans then count tokens.
    """

    messages: list[Message]
    response: str
    spans: tuple[LabelledSpan, ...]
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LabelledTokens(Tokens):
    """A tokenised answer. The loss mask is true where a label counts.

    labels: bool [T], true for right. prompt_length: tokens before the answer.
    """

    labels: Tensor
    prompt_length: int

    @property
    def prompt(self) -> list[int]:
        """The ids before the answer."""
        return self.input_ids[: self.prompt_length].tolist()


# -- reading ---------------------------------------------------------------------------------------


def read_labelled(row: dict[str, Any], corruptions: int = 1, seed: int = 0) -> list[LabelledAnswer]:
    """The labelled answers of one row.

    A problem gives each right solution (all of it right), `corruptions` copies of each with one
    changed result, and its wrong solutions with a known error. Wrong answers end after their
    error: what follows has no label. Where an error is inferred
    (`data.labelled.solution_errors.first_error`), label 0 means that the token belongs to the first
    step that no right solution takes, not that the token itself is wrong. A common beginning with
    an earlier answer to the question is labelled only once: to the target its tokens are the same,
    and they would otherwise be counted once per copy.

    Raises:
        Skipped: a row of an unknown shape.
    """
    # 1. A problem with solutions.
    if is_problem(row):
        problem = read_problem(row)
        messages = [{"role": "user", "content": problem.question}]
        chance = random.Random(f"{seed} {problem.question}")
        return [
            LabelledAnswer(messages, text, spans)
            for text, spans in _answers(problem, corruptions, chance)
        ]
    # 2. A response with spans, of characters or of its recorded tokens.
    response, spans, ids = row.get("response"), row.get("spans"), token_ids(row.get("response_ids"))
    if not isinstance(response, str) or not isinstance(spans, list):
        raise Skipped(f"the row has keys {', '.join(row) or '(none)'}: expected {SHAPES}")
    # What the prompt would lack is a reason to skip.
    for key in ("tools", TEMPLATE_ARGUMENTS):
        if row.get(key):
            raise Skipped(f"a labelled answer with `{key}`, which are not passed on here")
    length = len(response if ids is None else ids)
    return [
        LabelledAnswer(
            opening_of(row),
            response,
            tuple(_span(span, length) for span in spans),
            None if ids is None else tuple(ids),
        )
    ]


def _span(span: Any, length: int) -> LabelledSpan:
    if (
        not isinstance(span, list)
        or len(span) != 3
        or not all(type(bound) is int for bound in span)
        or not (0 <= span[0] < span[1] <= length and span[2] in (0, 1))
    ):
        raise Skipped("a span is no [start, end, label] inside the response with label 0 or 1")
    return span[0], span[1], span[2]


def _answers(
    problem: Problem, corruptions: int, chance: random.Random
) -> Iterator[tuple[str, tuple[LabelledSpan, ...]]]:
    """Texts and their spans; right spans begin where the text differs from all earlier ones."""
    earlier = list[str]()
    for text, (start, end) in _solutions(problem, corruptions, chance):
        shared = max((len(commonprefix((text[:start], other))) for other in earlier), default=0)
        earlier.append(text[:start])
        spans = [(shared, start, 1)] if shared < start else []
        spans += [(start, end, 0)] if start < end else []
        if spans:
            yield text, tuple(spans)


def _solutions(
    problem: Problem, corruptions: int, chance: random.Random
) -> Iterator[tuple[str, Span]]:
    """Texts that end after their error, and the error's characters (an empty span at the end of
    right texts)."""
    for solution in problem.right:
        yield solution.text, (len(solution.text), len(solution.text))
        for _ in range(corruptions):
            yield from corrupted(solution.text, chance)
    for solution in problem.wrong:
        if solution.error is not None:
            yield solution.text[: solution.error[1]], solution.error


def corrupted(text: str, chance: random.Random) -> Iterator[tuple[str, Span]]:
    """A right solution with one changed result, truncated after it, and the digits that differ.

    Yields nothing if `inject` cannot change a result.
    """
    changed = inject(text, chance)
    if changed is not None:
        yield changed.text, changed.error


# -- tokens ----------------------------------------------------------------------------------------


def tokenize_labelled(answer: LabelledAnswer, tokenizer: Any, max_length: int) -> LabelledTokens:
    """The answer after the target's chat template, as in decoding. A token that overlaps a wrong
    character is wrong.

    Raises:
        Skipped: no labelled token within `max_length`, or recorded tokens of another tokenizer.
    """
    prompt = prompt_ids(answer.messages, tokenizer)
    response, places = _response(answer, tokenizer)
    labels = [_label(start, end, answer.spans) for start, end in places]
    ids = torch.tensor([*prompt, *response])[:max_length]
    label_ids = torch.tensor([-1] * len(prompt) + labels)[:max_length]
    if not bool((label_ids >= 0).any()):
        raise Skipped(f"no labelled token within the context ({max_length} tokens)")
    return LabelledTokens(
        ids,
        label_ids >= 0,
        label_ids == 1,
        min(len(prompt), max_length),
        cut=len(prompt) + len(response) > max_length,
    )


def _response(answer: LabelledAnswer, tokenizer: Any) -> tuple[Sequence[int], Sequence[Span]]:
    """The answer's tokens, and their places in the units of the spans (characters or tokens)."""
    if answer.ids is None:
        return answer_spans(
            [*answer.messages, {"role": "assistant", "content": answer.response}], tokenizer
        )
    # Recorded tokens must decode to the answer.
    in_vocabulary = max(answer.ids, default=0) < len(tokenizer)
    if (
        not in_vocabulary
        or tokenizer.decode(
            list(answer.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        != answer.response
    ):
        raise Skipped(
            "response_ids do not say what response does: they are another tokenizer's, mine them "
            "again with this target"
        )
    return answer.ids, [(i, i + 1) for i in range(len(answer.ids))]


def _label(start: int, end: int, spans: Iterable[LabelledSpan]) -> int:
    touched = [label for first, last, label in spans if start < last and first < end]
    return min(touched, default=-1)


def tokenize_labelled_rows(
    rows: Iterable[Row],
    source: str,
    tokenizer: Any,
    max_length: int,
    max_labels: int | None = None,
    corruptions: int = 1,
    seed: int = 0,
    vocab: int | None = None,
    tally: Tally | None = None,
) -> list[LabelledTokens]:
    """All labelled answers in order, each once, up to a budget of labelled tokens; skips are
    counted and logged.

    Args:
        vocab: rows of the model's embedding, see `data.conversations.check_ids`.
        tally: counts skipped rows; it may already hold unreadable ones.

    Raises:
        ValueError: no labelled answer can be used.
    """
    tally = Tally("answer") if tally is None else tally

    def tokenized(answer: LabelledAnswer) -> LabelledTokens:
        document = tokenize_labelled(answer, tokenizer, max_length)
        check_ids(document.input_ids, tokenizer, vocab)
        return document

    def read(content: Any) -> list[LabelledAnswer]:
        return read_labelled(content, corruptions, seed)

    def taken(document: LabelledTokens, place: Place | None) -> None:
        count_cut((document,), max_length, tally, place)

    documents = each_once(rows, read, tokenized, max_labels, tally, taken)
    if not documents:
        raise ValueError(f"data set {source!r} has no labelled answer: {tally.reasons()}")
    return list(documents.values())


# -- batches ---------------------------------------------------------------------------------------


class LabelledBatches(Batches):
    """Batches of packed labelled answers."""

    def _collate(self, rows: list[list[LabelledTokens]]) -> LabelledBatch:
        text = super()._collate(rows)
        # Labels and questions in the layout of the packed rows.
        labels, questions = torch.zeros_like(text.input_ids), torch.zeros_like(text.input_ids)
        for b, row in enumerate(rows):
            joined = torch.cat([document.labels for document in row])
            labels[b, : len(joined)] = joined
            numbers = torch.tensor([int(hash_ids(document.prompt)[:12], 16) for document in row])
            questions[b, : len(joined)] = numbers.repeat_interleave(
                torch.tensor([len(document) for document in row])
            )
        return LabelledBatch(text, labels, questions)

    def _texts(self, batch: LabelledBatch) -> tuple[TextBatch, ...]:
        return (batch.text,)


class LabelledData(ConversationData):
    """Answers labelled token by token; the other keys are those of `ConversationData`.

    Args:
        corruptions: copies of each right solution with one changed result.
        kwargs: `train` and `validation` are files or Hub data sets whose rows hold a question with
            right and wrong solutions, or labelled spans; `embedded` are word problems written for
            this project.
    """

    batches: ClassVar[type[Batches]] = LabelledBatches

    def __init__(self, corruptions: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if corruptions < 0:
            raise ValueError(f"data.corruptions must be 0 or above, got {corruptions}")
        self.corruptions = corruptions

    def _tokenized(self, source: str, split: str, budget: int | None) -> list[Any]:
        assert self._target is not None
        tally = self._tally("answer")
        rows = read_rows(
            str(EMBEDDED_SOLUTIONS) if source == "embedded" else source,
            split,
            budget is not None,
            tally,
        )
        return tokenize_labelled_rows(
            rows,
            source,
            self._target.tokenizer,
            self.max_length,
            budget,
            self.corruptions,
            self.seed,
            self._target.shape.vocab_size,
            tally,
        )

"""Pairs of a better and a worse answer to the same prompt, as batches.

Shape legend: B pairs, T tokens of a row.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from data.chat_tokens import answer_spans
from data.conversations import Tokens, check_ids, count_cut, each_once, hash_ids, tokenize_answer
from data.corpora.word_problems import EMBEDDED_SOLUTIONS
from data.datamodule import Batches, ConversationData
from data.labelled.solution_errors import Span, frequent_wrong, inject, is_problem, read_problem
from data.packing import collate
from data.reading.files import Place, Row, Skipped, Tally, read_rows
from data.reading.rows import (
    ASKED,
    CHATS,
    Conversation,
    Message,
    after_system,
    opening_of,
    spoken,
    template_of,
    tools_of,
)
from modules.contracts.batches import PreferenceBatch, TextBatch
from modules.contracts.shapes import StateName

if TYPE_CHECKING:
    from data.feature_cache.cache import FeatureCache
    from modules.contracts.target import Target

EMBEDDED_PAIRS = Path(__file__).parent / "prompts" / "preferences.jsonl"
EMBEDDED_SOURCES = {"embedded": EMBEDDED_PAIRS, "embedded_solutions": EMBEDDED_SOLUTIONS}
SHAPES = (
    "`chosen` + `rejected` (text with a `prompt`, turns, or `Human:`/`Assistant:` dialogues), or a "
    "`question` with solutions known to be right or wrong"
)
_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """Messages before the assistant's turn, and two answers to them; if one of them is None, the
    other is a single right or wrong trace without a counterpart.

    error: characters of the first mistake in the rejected answer, if known. inferred: whether the
    mistake may be anywhere in the step that `error` spans. turns: the two answers as turns, if they
    hold more than text. tools: descriptions of the functions that the assistant may call. template:
    the row's own arguments of the chat template.
    """

    messages: list[Message]
    chosen: str | None
    rejected: str | None
    error: Span | None = None
    inferred: bool = False
    turns: tuple[Message, Message] | None = None
    tools: list[Any] | None = None
    template: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pair:
    """A tokenised preference: two documents with the same prompt; the loss mask covers only the
    last answer.

    errors: bool [T], wrong tokens of the rejected document; all of a step if `inferred`.
    compared: whether both sides exist. A missing side has one token and an empty loss mask.
    """

    chosen: Tokens
    rejected: Tokens
    errors: Tensor
    inferred: bool = False
    compared: bool = True

    def __len__(self) -> int:
        """T of the longer document."""
        return max(len(self.chosen), len(self.rejected))

    @cached_property
    def input_ids(self) -> Tensor:
        """The ids of both documents, concatenated."""
        return torch.cat([self.chosen.input_ids, self.rejected.input_ids])

    @cached_property
    def loss_mask(self) -> Tensor:
        """The loss masks of both documents, concatenated."""
        return torch.cat([self.chosen.loss_mask, self.rejected.loss_mask])

    @property
    def key(self) -> str:
        """The keys of both documents, concatenated."""
        return self.chosen.key + self.rejected.key

    @property
    def prompt(self) -> list[int]:
        """The ids before the answers."""
        return (self.chosen if self.chosen.response_tokens else self.rejected).prompt

    @property
    def group(self) -> str:
        """Hash of the prompt; pairs of a group are held out together."""
        return hash_ids(self.prompt)

    @property
    def response_tokens(self) -> int:
        """Tokens of both answers, as counted by budgets; 0 for a single trace."""
        return self.chosen.response_tokens + self.rejected.response_tokens if self.compared else 0


# -- reading ---------------------------------------------------------------------------------------


def read_preferences(row: dict[str, Any], corruptions: int = 0, seed: int = 0) -> list[Preference]:
    """The preferences of one row: one, or those of a problem, as in cDPO's released code.

    A problem gives one pair, a right solution (`Problem.positive`) against the most frequent wrong
    one, and each further frequent wrong solution as a single trace; without a wrong solution, its
    right one as a trace. `corruptions` adds pairs with the same right solution, whose rejected side
    is a copy of it with one changed result.

    Raises:
        Skipped: a row of an unknown shape, or dialogues that differ before their last answer or do
            not end with one.
    """
    # 1. A problem: frequent wrong solutions, and injected errors.
    if is_problem(row):
        problem = read_problem(row)
        messages = [{"role": "user", "content": problem.question}]
        right, wrong = problem.positive.text, frequent_wrong(problem)
        chance = random.Random(f"{seed} {problem.question}")
        changed = [
            injected
            for injected in (inject(right, chance) for _ in range(corruptions))
            if injected is not None
        ]
        traces = [
            Preference(
                messages, None if k else right, solution.text, solution.error, solution.inferred
            )
            for k, solution in enumerate(wrong)
        ]
        return [
            *(traces or [Preference(messages, right, None)]),
            *(
                Preference(messages, right, injected.text + injected.rest, injected.error)
                for injected in changed
            ),
        ]
    # 2. Two answers to one prompt.
    if not {"chosen", "rejected"} <= row.keys():
        raise Skipped(f"the row has keys {', '.join(row) or '(none)'}: expected {SHAPES}")
    preference = _dialogues(_dialogue(row, "chosen"), _dialogue(row, "rejected"))
    return [replace(preference, tools=tools_of(row), template=template_of(row))]


def _dialogue(row: dict[str, Any], key: str) -> list[Message]:
    """All turns of one side: its own if they begin with the question, else after the row's."""
    said = row[key]
    asks = any(row.get(name) for name in (*CHATS, "turns", *ASKED))
    if not asks and isinstance(said, str):
        return _turns(said, key)
    answer = spoken(said, key, "assistant")
    if answer and answer[0]["role"] != "assistant":
        return after_system(row, answer)
    return [*opening_of(row), *answer] if asks else answer


def _turns(dialogue: str, key: str) -> list[Message]:
    """The turns of a dialogue written as `\\n\\nHuman: … \\n\\nAssistant: …`."""
    before, *parts = _TURN.split(dialogue if dialogue.startswith("\n\n") else "\n\n" + dialogue)
    if before.strip() or not parts:
        raise Skipped(f"`{key}` without a `prompt` does not begin with 'Human:'")
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2])
    ]


def _dialogues(chosen: list[Message], rejected: list[Message]) -> Preference:
    if not chosen or not rejected or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise Skipped("the dialogue does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Skipped("the dialogues differ before the last answer")
    better, worse = chosen[-1], rejected[-1]
    return Preference(
        chosen[:-1],
        better["content"] or "",
        worse["content"] or "",
        turns=(better, worse),
    )


# -- tokens ----------------------------------------------------------------------------------------


def tokenize_pair(
    preference: Preference, tokenizer: Any, max_length: int, end_ids: Collection[int] | None = None
) -> Pair:
    """Both answers as rendered by the target's chat template. Raises Skipped if they are equal or
    one is empty."""
    # 1. Each side after the same messages; a missing one stays None.
    sides: list[Tokens | None] = []
    answers = preference.chosen, preference.rejected
    turns = preference.turns or [
        {"role": "assistant", "content": answer or ""} for answer in answers
    ]
    for answer, turn in zip(answers, turns, strict=True):
        dialogue = Conversation(
            [*preference.messages, turn], tools=preference.tools, template=preference.template
        )
        sides.append(
            None if answer is None else tokenize_answer(dialogue, tokenizer, max_length, end_ids)
        )
    # 2. A missing side gets the other's first token.
    real = next(side for side in sides if side is not None)
    chosen, rejected = (_absent(real) if side is None else side for side in sides)
    if chosen.key == rejected.key:
        raise Skipped("both answers are the same")
    errors = error_tokens(rejected, preference, tokenizer)
    return Pair(chosen, rejected, errors, preference.inferred, compared=None not in sides)


def _absent(other: Tokens) -> Tokens:
    """A placeholder for a missing side: one token without a loss."""
    return Tokens(other.input_ids[:1], torch.zeros(1, dtype=torch.bool))


def separate_traces(pairs: Iterable[Pair]) -> list[Pair]:
    """The right and wrong traces of some pairs, each once on its side: a right solution of several
    pairs is a trace only in the first. None of them is `compared`."""
    seen: dict[str, set[str]] = {"chosen": set(), "rejected": set()}
    traces = []
    for pair in pairs:
        sides: dict[str, Tokens] = {}
        # A side seen before becomes a placeholder.
        for name, keys in seen.items():
            side: Tokens = getattr(pair, name)
            sides[name] = _absent(side) if side.key in keys else side
            keys.add(side.key)
        if any(side.response_tokens for side in sides.values()):
            errors = pair.errors[: len(sides["rejected"])]
            traces.append(Pair(**sides, errors=errors, inferred=pair.inferred, compared=False))
    return traces


def error_tokens(rejected: Tokens, preference: Preference, tokenizer: Any) -> Tensor:
    """bool [T]: tokens of the rejected document that overlap the known error."""
    errors = torch.zeros(len(rejected), dtype=torch.bool)
    if preference.error is None or preference.rejected is None:
        return errors
    # Characters of the answer to tokens of the document.
    start, end = preference.error
    ids, spans = answer_spans(
        [*preference.messages, {"role": "assistant", "content": preference.rejected}], tokenizer
    )
    places = rejected.loss_mask.nonzero()[: len(ids), 0]
    assert rejected.input_ids[places].tolist() == ids[: len(places)], (
        "one text has one tokenisation"
    )
    errors[places] = torch.tensor([first < end and start < last for first, last in spans])[
        : len(places)
    ]
    return errors


def tokenize_pairs(
    rows: Iterable[Row],
    source: str,
    tokenizer: Any,
    max_length: int,
    max_response_tokens: int | None = None,
    end_ids: Collection[int] | None = None,
    corruptions: int = 0,
    seed: int = 0,
    vocab: int | None = None,
    tally: Tally | None = None,
) -> list[Pair]:
    """All usable pairs in order, each once, up to a budget of response tokens, and the single
    traces of the same rows; skips are counted and logged.

    Args:
        vocab: rows of the model's embedding, see `data.conversations.check_ids`.
        tally: counts skipped rows; it may already hold unreadable ones.

    Raises:
        ValueError: no pair can be used.
    """
    tally = Tally("pair") if tally is None else tally

    def tokenized(preference: Preference) -> Pair:
        pair = tokenize_pair(preference, tokenizer, max_length, end_ids)
        check_ids(pair.input_ids, tokenizer, vocab)
        return pair

    def read(content: Any) -> list[Preference]:
        return read_preferences(content, corruptions, seed)

    def taken(pair: Pair, place: Place | None) -> None:
        count_cut((pair.chosen, pair.rejected), max_length, tally, place)

    pairs = each_once(rows, read, tokenized, max_response_tokens or None, tally, taken)
    # Single traces alone cannot train a preference.
    if not any(pair.compared for pair in pairs.values()):
        reasons = (
            "no question has a wrong solution" if pairs and not tally.skipped else tally.reasons()
        )
        raise ValueError(f"no pair of data set {source!r} can be trained on: {reasons}")
    return list(pairs.values())


# -- batches ---------------------------------------------------------------------------------------


class PairBatches(Batches):
    """Batches of pairs, one pair per row of each side, without packing."""

    def _pack(self, max_length: int) -> list[list[int]]:
        return [[i] for i in range(len(self.documents))]

    def _collate(self, rows: list[list[Pair]]) -> PreferenceBatch:
        chosen, rejected = (
            collate([[side] for side in sides])
            for sides in zip(*((pair.chosen, pair.rejected) for (pair,) in rows), strict=True)
        )
        errors = torch.zeros_like(rejected.loss_mask)
        for b, (pair,) in enumerate(rows):
            errors[b, : len(pair.errors)] = pair.errors
        return PreferenceBatch(
            chosen,
            rejected,
            errors=errors,
            inferred=torch.tensor([pair.inferred for (pair,) in rows]),
        )

    def _texts(self, batch: PreferenceBatch) -> tuple[TextBatch, ...]:
        return batch.chosen, batch.rejected


class PreferenceData(ConversationData):
    """Preference pairs; the other keys are those of `ConversationData`.

    `train` and `validation` are files or Hub data sets whose rows hold `chosen` and `rejected`
    (text with a `prompt`, turns, `Human:`/`Assistant:` dialogues) or a question with right and
    wrong solutions; or `embedded` (pairs written for this project), or `embedded_solutions` (word
    problems). `rows` are pairs per batch. States that a loss reads are computed online: `features`
    is not used.

    A question gives one pair. Earlier training stages (cDPO's two estimators) read `for_stages`:
    each right and each wrong trace once, including those of questions without a pair. Budgets of
    tokens only count pairs.

    Args:
        corruptions: further pairs of each problem, whose rejected answer is the chosen one with one
            changed result, so that the error's place is known.
        kwargs: of `ConversationData`.
    """

    batches: ClassVar[type[Batches]] = PairBatches

    def __init__(self, corruptions: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if corruptions < 0:
            raise ValueError(f"data.corruptions must be 0 or above, got {corruptions}")
        self.corruptions = corruptions
        self.traces: list[Pair] = []
        self.held_out_traces: list[Pair] = []

    def read(self, target: Target) -> None:
        """As `ConversationData.read`, with pairs and traces separated. Raises ValueError if the
        training or the held-out part has no pair."""
        super().read(target)
        everything: list[list[Any]] = [self.documents, self.held_out]
        self.traces, self.held_out_traces = map(separate_traces, everything)
        self.documents, self.held_out = (
            [pair for pair in documents if pair.compared] for documents in everything
        )
        if not self.documents or not self.held_out:
            raise ValueError(
                f"data set {self.train!r}: no question with a right and a wrong "
                f"solution is left {'to train on' if self.held_out else 'to hold out'}"
                ": give more data, or a larger data.validation_fraction"
            )

    def for_stages(self) -> PreferenceData:
        """The data with every trace once, for stages that train on single traces."""
        data = copy.copy(self)
        data.documents = cast(list[Any], self.traces)
        data.held_out = cast(list[Any], self.held_out_traces)
        return data

    def summary(self) -> dict[str, Any]:
        """The summary of `ConversationData`, with the numbers of right and wrong traces."""
        right, wrong = (
            sum(bool(side.response_tokens) for side in sides)
            for sides in (
                [pair.chosen for pair in self.traces],
                [pair.rejected for pair in self.traces],
            )
        )
        return {**super().summary(), "right_traces": right, "wrong_traces": wrong}

    def _tokenized(self, source: str, split: str, budget: int | None) -> list[Any]:
        assert self._target is not None
        tally = self._tally("pair")
        rows = read_rows(
            str(EMBEDDED_SOURCES.get(source, source)), split, budget is not None, tally
        )
        return tokenize_pairs(
            rows,
            source,
            self._target.tokenizer,
            self.max_length,
            budget,
            self._target.eos_ids,
            self.corruptions,
            self.seed,
            self._target.shape.vocab_size,
            tally,
        )

    def _open_cache(self, target: Target, states: Sequence[StateName]) -> FeatureCache | None:
        return None

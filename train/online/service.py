"""Answers requests one at a time, records each, and lets the drafters learn between them.

A request counts as answered once its line is in `answers.jsonl`; what a killed run has beyond that
is dropped, and the request is answered again, with the same weights and so the same text.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.command_line.outputs import append_lines, write_whole
from data.conversations import check_ids, prompt_ids
from data.reading.files import clean
from eval.report.token_pieces import pieces
from modules.contracts.drafter import TreeBuilder
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import Run, Trace
from modules.target.target import Target
from train.online.recorder import Recorder
from train.online.settings import DecodingSettings
from train.online.update import Learner, Update

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Request:
    """One question.

    messages: turns up to it.
    options: temperature, top_p and seed, where they differ from the recipe's (whose seed is another
        one for each request).
    limit: new tokens at most.
    labels: what else came with it, such as its topic; written beside the answer.
    place: its number in the stream, where it comes from one.
    """

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    place: int | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to a request, and the line that records it."""

    text: str
    trace: Trace
    finished: bool
    line: dict[str, Any]


class Service:
    """Answers requests with drafters that learn.

    Args:
        target: of all drafters.
        learners: by name.
        decoding: how requests are answered.
        builder: of the drafters' trees; None is their own.
        output: folder of the run.
        route: the name of the learner that serves a request.
        watch: called with every recorded line, and with the name and the result of every update.
        seed: of sampling.
    """

    def __init__(
        self,
        target: Target,
        learners: Mapping[str, Learner],
        decoding: DecodingSettings,
        builder: TreeBuilder | None,
        output: Path,
        route: Callable[[Request], str],
        watch: Watch | None = None,
        seed: int = 0,
    ) -> None:
        self.target, self.learners, self.decoding = target, learners, decoding
        self.file, self.route, self.seed = output / ANSWERS, route, seed
        self.watch = watch or Watch()
        self.decoders = {
            name: SpeculativeDecoder(target, each.serving, None, builder, decoding.budget)
            for name, each in learners.items()
        }
        self.lines: list[dict[str, Any]] = []
        self._one_at_a_time = threading.Lock()

    # -- answering ---------------------------------------------------------------------------------

    def prompt(self, request: Request) -> list[int]:
        """Token ids of a request.

        Raises:
            ValueError: the chat template refuses it, or it leaves no room for an answer.
        """
        ids = prompt_ids(clean(list(request.messages)), self.target.tokenizer)
        check_ids(ids, self.target.tokenizer, self.target.shape.vocab_size)
        limit, room = request.limit or self.decoding.max_new_tokens, self.target.max_positions
        if len(ids) + limit > room:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {limit} new ones exceed the target's context "
                f"of {room}: shorten the prompt, or lower the limit"
            )
        return ids

    def sampling(self, request: Request, number: int = 0) -> Sampling:
        """How the request of this number is sampled. ValueError: an option out of range."""
        return replace(self.decoding.sampling(self.seed + number), **request.options)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot be answered."""
        self.prompt(request)
        self.sampling(request)

    def answer(self, request: Request, show: Callable[[str], None] | None = None) -> Answer:
        """Answer a request and record it. Requests from several threads wait for each other, and
        never for an update.

        Args:
            request: as `prompt` accepts it.
            show: called with each piece of the text as it comes.
        """
        prompt = self.prompt(request)
        name = self.route(request)
        learner = self.learners[name]
        with self._one_at_a_time:
            # 1. The newest weights, which stay for the whole answer.
            learner.refresh()
            number = len(self.lines)
            sampling = self.sampling(request, number)
            recorder = Recorder(prompt, sampling, learner.settings, learner.states)
            limit = request.limit or self.decoding.max_new_tokens
            run = self.decoders[name].begin([prompt], sampling, limit, recorder)
            text = "".join(self._spoken(run, show))
            # 2. Its item, then the line that makes it count.
            trace = run.traces[0]
            tested = recorder.tested(trace.ids)
            line = {
                "request": number,
                **({} if request.place is None else {"place": request.place}),
                "labels": dict(request.labels),
                "drafter": name,
                "updates": learner.served_updates,
                "tested": len(tested),
                "accepted": sum(tested),
                "calls": len(trace.accepted),
                "tokens": len(trace.ids),
                "response": text,
                "response_ids": trace.ids,
            }
            item = recorder.item(number, trace.ids)
            learner.store(item)
            append_lines(self.file, [json.dumps(line)])
            self.lines.append(_remembered(line))
            learner.add(item)
        self.watch.answered(line)
        return Answer(text, trace, trace.ids[-1] in self.target.eos_ids, line)

    def _spoken(self, run: Run, show: Callable[[str], None] | None) -> Iterator[str]:
        def tokens() -> Iterator[tuple[int, bool]]:
            shown, trace = 0, run.traces[0]
            for _ in run:
                yield from zip(trace.ids[shown:], trace.drafted[shown:], strict=True)
                shown = len(trace.ids)

        for text, _ in pieces(tokens(), self.target.tokenizer):
            if show is not None:
                show(text)
            yield text

    # -- learning ----------------------------------------------------------------------------------

    def learn(self) -> None:
        """All updates that are due, one after the other."""
        for name, learner in self.learners.items():
            while learner.due:
                self.watch.updated(name, learner.update())

    def save(self) -> None:
        """Save the state of all drafters."""
        for learner in self.learners.values():
            learner.save()

    def load(self) -> None:
        """Go on where a killed run was."""
        lines = self.file.read_text(encoding="utf-8").split("\n") if self.file.exists() else []
        self.lines = [_remembered(json.loads(line)) for line in lines[:-1]]
        # The last line was cut where the process was killed.
        if lines and lines[-1]:
            write_whole({self.file: "".join(f"{line}\n" for line in lines[:-1])})
        self.watch.resumed(self.lines)
        for learner in self.learners.values():
            learner.load(len(self.lines))


def _remembered(line: dict[str, Any]) -> dict[str, Any]:
    """What stays in memory of a line: no texts of an endpoint, which may serve for months."""
    if "place" in line:
        return line
    return {key: value for key, value in line.items() if not key.startswith("response")}


class Watch:
    """Is told of answers and updates; this one ignores them."""

    def resumed(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Requests that an earlier part of the run has answered."""

    def answered(self, line: Mapping[str, Any]) -> None:
        """One more request has been answered."""

    def updated(self, name: str, update: Update) -> None:
        """A drafter has learnt."""

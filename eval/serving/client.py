"""Streamed chat completions and their times, with the `openai` client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.command_line.redaction import printable, redacted
from modules.contracts.sampling import Sampling

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_LONGEST_TROUBLE = 300
_REASONING = ("reasoning_content", "reasoning")
"""Fields of the reasoning in answers of servers with a reasoning parser."""
_TEMPLATE = "chat_template_kwargs"


@dataclass(frozen=True)
class Question:
    """One request: the prompt's id and task, its text and the seed.

    system: system prompt. tools: functions that are offered. template: arguments of the chat
    template beside the server's.
    """

    prompt: str
    task: str
    text: str
    seed: int
    system: str = ""
    tools: list[Any] | None = None
    template: dict[str, Any] | None = None

    @property
    def messages(self) -> list[Any]:
        """The turns that are sent."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.text}]

    def fields(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Further fields of the request, with this prompt's tools and arguments."""
        tools = {"tools": self.tools} if self.tools else {}
        arguments = {**extra.get(_TEMPLATE, {}), **(self.template or {})}
        return {**extra, **tools, **({_TEMPLATE: arguments} if arguments else {})}


@dataclass
class Timing:
    """One answer as it arrived; times are seconds of one clock.

    sent, ended: of the request. pieces: arrival of each piece of text, calls of functions included.
    tokens: as the server counts them, or the number of pieces where it does not (`counted` False).
    drafted, accepted: draft tokens of this answer, where the server tells them (llama.cpp).
    trouble: why there is no answer; empty for a whole one.
    """

    question: Question
    sent: float
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    counted: bool = False
    drafted: int | None = None
    accepted: int | None = None
    trouble: str = ""

    @property
    def to_first(self) -> float:
        """Seconds from the request to the first piece of text."""
        return self.pieces[0] - self.sent

    @property
    def after_first(self) -> float:
        """Seconds from the first piece to the last."""
        return self.pieces[-1] - self.pieces[0]


@dataclass(frozen=True)
class Server:
    """A server, and how it is asked.

    client: of the `openai` package, without retries of its own: a retried request would be timed as
    one slow answer.
    model: the server's name of the model. limit: tokens of an answer. extra: fields of the request
    that only some servers know.
    """

    client: AsyncOpenAI
    model: str
    sampling: Sampling
    limit: int
    extra: dict[str, Any] = field(default_factory=dict)

    async def ask(self, question: Question) -> Timing:
        """Send one request, and note when each piece of its answer arrives."""
        timing = Timing(question, time.perf_counter())
        try:
            stream = await self.client.chat.completions.create(
                model=self.model,
                messages=question.messages,
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=self.limit,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                seed=question.seed,
                extra_body=question.fields(self.extra),
            )
            async for chunk in stream:
                _note(timing, chunk)
        except Exception as error:  # one failed request is counted, and does not end a sweep
            timing.trouble = trouble_of(error)
        timing.ended = time.perf_counter()
        if not timing.trouble and not timing.pieces:
            timing.trouble = "an answer without text"
        if not timing.counted:
            timing.tokens = len(timing.pieces)
        return timing


def _note(timing: Timing, chunk: Any) -> None:
    """Add one event of a stream to what is known of its answer."""
    now = time.perf_counter()
    for choice in chunk.choices or ():
        if piece := _piece(choice.delta):
            timing.pieces.append(now)
            timing.text += piece
    if chunk.usage is not None and chunk.usage.completion_tokens:
        timing.tokens, timing.counted = chunk.usage.completion_tokens, True
    # llama.cpp tells a request's own drafts.
    drafts = getattr(chunk, "timings", None)
    if isinstance(drafts, dict) and "draft_n" in drafts:
        timing.drafted = int(drafts["draft_n"])
        timing.accepted = int(drafts.get("draft_n_accepted", 0))


def _piece(delta: Any) -> str:
    """The text that an event adds: of the answer, of its reasoning, or of a call of a function,
    which servers with a tool parser tell apart; empty for none.
    """
    for name in ("content", *_REASONING):
        if piece := getattr(delta, name, None):
            return str(piece)
    calls = [call.function for call in getattr(delta, "tool_calls", None) or () if call.function]
    return "".join(f"{call.name or ''}{call.arguments or ''}" for call in calls)


def trouble_of(error: BaseException) -> str:
    """The reason of a failed request, in one line without credentials."""
    text = printable(redacted(str(error))) or type(error).__name__
    return text[:_LONGEST_TROUBLE]


async def served_model(client: AsyncOpenAI, chosen: str | None, url: str) -> str:
    """The model's name: the chosen one, which the server must list, or the first that it lists.

    Raises:
        ValueError: the server cannot be reached, or lists no such model.
    """
    try:
        names: Sequence[str] = [model.id async for model in client.models.list()]
    except Exception as error:  # the client's errors have several bases
        raise ValueError(f"url {url}: {trouble_of(error)}: is the server running?") from error
    if not names or (chosen is not None and chosen not in names):
        raise ValueError(
            f"url {url} lists {', '.join(names) or 'no model'}: give one of them as serving.model"
        )
    return chosen or names[0]

"""An OpenAI-compatible endpoint in front of a service: chat completions, whole or streamed.

Requests are answered one at a time in the order in which they come. Updates run in a thread beside
that, so that no request waits for one. A request that has been accepted is answered and recorded,
also when its client has gone and when the server is told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from data.reading.rows import read_message
from modules.decoding.loop import Trace
from train.online.service import Answer, Request, Service
from train.online.settings import ServerSettings

logger = logging.getLogger(__name__)

_COUNTER = "slipstream:spec_decode_num_"
LARGEST = 8 * 2**20
"""Bytes of a request."""
_NUMBERS = {"temperature": (int, float), "top_p": (int, float), "seed": (int,)}
_LIMITS = ("max_completion_tokens", "max_tokens")
_PLAIN = {
    "n": (1,),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
}
"""Fields that would change the answer, and the values (besides null) that do not."""


@dataclass
class DraftCounters:
    """Drafts of all answers. Only the thread that answers adds to them.

    drafts: calls of the target that drafted. tokens: drafted ones, of which `accepted` were.
    by_position: calls that accepted at least so many drafts.
    """

    drafts: int = 0
    tokens: int = 0
    accepted: int = 0
    by_position: list[int] = field(default_factory=list)

    def add(self, trace: Trace) -> None:
        """Count an answer's calls."""
        for nodes, emitted in zip(trace.nodes, trace.accepted):
            # A call emits its accepted drafts and one token more, unless the answer ends before.
            accepted = max(0, emitted - 1)
            if nodes:
                self.drafts, self.tokens = self.drafts + 1, self.tokens + nodes
                self.accepted += accepted
                self.by_position += [0] * (accepted - len(self.by_position))
                for depth in range(accepted):
                    self.by_position[depth] += 1

    def page(self) -> str:
        """The counters in Prometheus' text format."""
        named = {
            "drafts": self.drafts,
            "draft_tokens": self.tokens,
            "accepted_tokens": self.accepted,
        }
        lines = [f"{_COUNTER}{name}_total {value}" for name, value in named.items()]
        per_position = f"{_COUNTER}accepted_tokens_per_pos_total"
        lines += [
            f'{per_position}{{position="{depth}"}} {value}'
            for depth, value in enumerate(self.by_position)
        ]
        return "\n".join([*lines, ""])


class Endpoint:
    """The application, and the threads that answer and learn.

    Args:
        service: answers requests; only this endpoint uses it.
        model: name of the model in answers.
    """

    def __init__(self, service: Service, model: str) -> None:
        self.service, self.model = service, model
        self.trouble: BaseException | None = None
        """An error of an update; after one, requests are answered and nothing is learnt."""
        self.drafts = DraftCounters()
        self._answering = ThreadPoolExecutor(1, "answers")
        self._learning = ThreadPoolExecutor(1, "updates")
        self.application = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
            ]
        )

    def close(self) -> None:
        """Answer what has been accepted, and end the updates that are due."""
        self._answering.shutdown()
        self._learning.shutdown()

    # -- HTTP --------------------------------------------------------------------------------------

    async def models(self, _: HttpRequest) -> Response:
        """The list of models: the target alone."""
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "slipstream"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, http: HttpRequest) -> Response:
        """A chat completion. 400 names what cannot be answered."""
        try:
            body = await _json(http)
            request = request_of(body)
            await asyncio.to_thread(self.service.check, request)
        except ValueError as error:
            return _refusal(400, str(error))
        if body.get("stream"):
            options = body.get("stream_options")
            counted = isinstance(options, Mapping) and options.get("include_usage") is True
            events = self._stream(request, counted)
            return StreamingResponse(events, media_type="text/event-stream")
        # An answer goes on without its client: the thread knows nothing of connections.
        answer = await asyncio.wrap_future(self._submit(request))
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": _reason(answer)}
        head = self._head("chat.completion")
        return JSONResponse({**head, "choices": [choice], "usage": _usage(answer)})

    async def metrics(self, _: HttpRequest) -> Response:
        """Counters of the drafts, under vLLM's names, in Prometheus' text format."""
        return PlainTextResponse(self.drafts.page())

    def _stream(self, request: Request, counted: bool) -> AsyncIterator[str]:
        """The events of an answer, which begins at once; `counted`: with its numbers of tokens."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def show(piece: str | None) -> None:
            # The loop has ended where the server is told to stop; the answer goes on.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        # Pieces come from the answering thread; None is the last one.
        future = self._submit(request, show)
        future.add_done_callback(lambda _: show(None))
        return self._events(queue, future, counted)

    async def _events(
        self, queue: asyncio.Queue[str | None], future: Future[Answer], counted: bool
    ) -> AsyncIterator[str]:
        head = self._head("chat.completion.chunk")
        yield _event(head, {"role": "assistant", "content": ""})
        while (piece := await queue.get()) is not None:
            yield _event(head, {"content": piece})
        yield _event(head, {}, _reason(future.result()))
        if counted:
            usage = _usage(future.result())
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.model}

    # -- threads -----------------------------------------------------------------------------------

    def _submit(
        self, request: Request, show: Callable[[str], None] | None = None
    ) -> Future[Answer]:
        return self._answering.submit(self._answer, request, show)

    def _answer(self, request: Request, show: Callable[[str], None] | None) -> Answer:
        answer = self.service.answer(request, show)
        self.drafts.add(answer.trace)
        if self.trouble is None:
            self._learning.submit(self._learn)
        return answer

    def _learn(self) -> None:
        try:
            if self.trouble is None:
                self.service.learn()
        except Exception as error:
            logger.error("an update failed, and nothing more is learnt: %s", error)
            self.trouble = error


def serve(endpoint: Endpoint, settings: ServerSettings, place: socket.socket) -> None:
    """Serve at an address until a signal; requests in progress are answered before it returns."""
    config = uvicorn.Config(
        endpoint.application, log_level="warning", limit_concurrency=settings.waiting
    )
    print(f"serving on http://{settings.host}:{settings.port}/v1, Ctrl-C stops", flush=True)
    uvicorn.Server(config).run([place])


def request_of(body: Mapping[str, Any]) -> Request:
    """The request of a chat completion's body.

    Raises:
        ValueError: a field that cannot be read, or one that is not supported and would change the
            answer.
    """
    # 1. What is not supported.
    for name, plain in _PLAIN.items():
        if body.get(name) is not None and body[name] not in plain:
            raise ValueError(f"{name} is not supported, got {body[name]!r}: leave it out")
    # 2. The chat.
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError("messages must be a list of turns with `role` and `content`")
    messages = [read_message(turn) for turn in turns]
    # 3. Sampling and the limit.
    options = {name: body[name] for name in _NUMBERS if body.get(name) is not None}
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, _NUMBERS[name]):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= options.get("seed", 0) < 1 << 62:
        raise ValueError(f"seed must be at least 0 and below 2**62, got {options['seed']}")
    limit = next((body[name] for name in _LIMITS if body.get(name) is not None), None)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{' or '.join(_LIMITS)} must be a whole number above 0, got {limit!r}")
    labels = body.get("metadata")
    if labels is not None and not isinstance(labels, dict):
        raise ValueError(f"metadata must be an object, got {labels!r}")
    return Request(messages, options, limit, {str(k): str(v) for k, v in (labels or {}).items()})


async def _json(http: HttpRequest) -> Mapping[str, Any]:
    # Pages of other sites may only send other types without asking first.
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip() != "application/json":
        raise ValueError(f"content-type must be application/json, got {kind!r}")
    content = bytearray()
    async for part in http.stream():
        content += part
        if len(content) > LARGEST:
            raise ValueError(f"a request has at most {LARGEST} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    if not isinstance(body, Mapping):
        raise ValueError("the request is not a JSON object")
    return body


def _refusal(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status)


def _usage(answer: Answer) -> dict[str, int]:
    used, new = answer.trace.prompt_tokens, len(answer.trace.ids)
    return {"prompt_tokens": used, "completion_tokens": new, "total_tokens": used + new}


def _reason(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def _event(head: Mapping[str, Any], delta: Mapping[str, Any], reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

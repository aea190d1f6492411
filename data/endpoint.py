"""Answers from a server with the OpenAI chat protocol (vLLM, SGLang, llama.cpp, …) that runs the
target, requested with OpenAI's client.

A drafter must learn its own target's answers, so the server must run exactly that target. It
applies its chat template. A server that gives the tokens of prompts and answers (vLLM,
`return_token_ids`) is asked for them, so that nothing is tokenised again.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import openai

from configs.command_line.loading import config_parser, exit_with, parse
from configs.command_line.progress import progress_of
from configs.command_line.redaction import printable, redacted
from data.generation.answering import (
    Chat,
    Journal,
    Key,
    chats_of,
    making,
    open_questions,
    prompt_rows,
    prompts_digest,
    summary,
    write_answers,
)
from data.generation.requests import LONGEST_TROUBLE, TooLong, bounded_client
from data.reading.files import LONGEST_LINE, Place, Row, Skipped, Tally, clean, read_jsonl
from data.reading.rows import TEMPLATE_ARGUMENTS, Message, token_ids
from data.regenerate import Generation
from modules.target.generation_config import SERVED_NEUTRAL

logger = logging.getLogger(__name__)

DEFAULT_GENERATION = Generation()
_WORTH_RETRYING = (408, 409, 425, 429, 500, 502, 503, 504)
_OF_THE_PROMPT = (400, 413, 422)
"""Statuses of a refused prompt, for instance because it is longer than the context."""
_REASONING = ("reasoning_content", "reasoning")
"""Keys of the reasoning in answers of servers with a reasoning parser."""
_SENT = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Keys of turns that the protocol has."""
_TOKEN_IDS = "return_token_ids"
_NO_KEY = "none"
"""In place of a missing key, which is not sent."""


@dataclass(frozen=True)
class Endpoint:
    """The server that runs the target.

    Args:
        url: up to `/v1`, for instance http://127.0.0.1:8000/v1.
        model: the server's name of the model.
        concurrency: number of simultaneous requests.
        retries: further attempts after a busy or broken answer; the wait doubles each time.
        wait: seconds before the first retry.
        timeout: seconds for connecting, and again for the whole answer.
        key_variable: environment variable with the key, if the server requires one.
        refusals: prompts that the server may refuse (for instance too long ones) before the run
            ends; the output does not contain them.
        neutral: also request repetition_penalty 1, min_p 0 and top_k -1, which vLLM and SGLang
            otherwise take from the model's `generation_config`; false for a server that refuses
            these keys.
        chat_template: arguments of the target's chat template (sent as `chat_template_kwargs`,
            which vLLM and SGLang read), as in the recipe that trains on the answers; a prompt's own
            `chat_template_kwargs` go first.
        token_ids: also request the tokens of prompts and answers (`return_token_ids`, which vLLM
            knows and most servers ignore); false for a server that refuses this key.
    """

    url: str
    model: str
    concurrency: int = 16
    retries: int = 5
    wait: float = 1.0
    timeout: float = 600.0
    key_variable: str = "OPENAI_API_KEY"
    refusals: int = 0
    neutral: bool = True
    chat_template: dict[str, Any] | None = None
    token_ids: bool = True

    def __post_init__(self) -> None:
        """Refuse invalid addresses and values out of range."""
        # The address: a scheme, nothing unprintable, no credentials.
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"endpoint.url must begin with http:// or https://, got {redacted(self.url)!r}"
            )
        if not self.url.isprintable() or " " in self.url:
            raise ValueError(
                f"endpoint.url {redacted(self.url)!r} holds a space or a control character: give "
                "an address without"
            )
        if redacted(self.url) != self.url:
            raise ValueError(
                f"endpoint.url {redacted(self.url)} holds credentials: put the key into the "
                f"variable {self.key_variable} instead"
            )
        # Lower bounds of the numbers.
        for name, least in (
            ("concurrency", 1),
            ("retries", 0),
            ("wait", 0),
            ("timeout", 0.001),
            ("refusals", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"endpoint.{name} must be {least} or above, got {getattr(self, name)}"
                )


class Refused(ValueError):
    """The server refuses this prompt, but perhaps not others. place: of the prompt."""

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason)
        self.place = place


class Request(NamedTuple):
    """A request for one answer to a question of `chat`."""

    key: Key
    chat: Chat
    temperature: float
    messages: list[Message]


def regenerate_by(
    endpoint: Endpoint,
    prompts: Sequence[Row],
    output: str | Path,
    generation: Generation = DEFAULT_GENERATION,
    tally: Tally | None = None,
) -> Path:
    """Answer `prompts` through a server and write one JSONL row per answer, as
    `data.regenerate.regenerate` does.

    Every answer is written to a journal beside the output when it arrives, including pending ones
    when the run has to end; an interrupted run only requests the rest. Reasoning and tool calls
    that the server returns separately are stored in the answer's turn as `reasoning_content` and
    `tool_calls`, tokens as `response_ids` and `prompt_ids`.

    Raises:
        ValueError: the output exists, no prompt can be answered, the journal belongs to other
            settings, or the server refuses more than `endpoint.refusals` requests or still fails
            after the retries.
    """
    tally = Tally("prompt") if tally is None else tally
    with making(Path(output)) as place:
        # 1. Read the prompts, and continue a journal with the same settings.
        chats = chats_of(prompts, tally, offered=True)
        settings = {
            "target": endpoint.model,
            "prompts": prompts_digest([row.content for row in prompts]),
            "neutral": endpoint.neutral,
            "chat_template": endpoint.chat_template or None,
            **generation.settings(),
        }
        journal = Journal(place.with_name(place.name + ".journal"), settings)
        # 2. Request the answers.
        refused: list[Refused] = []
        asyncio.run(_answer_all(endpoint, chats, journal, generation, refused))
        # 3. Count refusals, and write the rows.
        for refusal in refused:
            tally.skip("refused by the server", refusal.place)
        if not journal.answers:
            raise ValueError(f"no prompt can be answered: {tally.reasons()}")
        write_answers(place, chats, generation.answers, journal, tally)
    return place


async def _answer_all(
    endpoint: Endpoint,
    chats: Sequence[Chat],
    journal: Journal,
    generation: Generation,
    refused: list[Refused],
) -> None:
    """Add all answers to the journal, turn by turn, because a question follows the answers before
    it."""
    total = generation.answers * sum(len(chat.questions) for chat in chats)
    shown = progress_of(endpoint.model, "answers", len(journal.answers), total)
    with shown as advance:
        async with _client(endpoint) as client:
            for turn in range(max(len(chat.questions) for chat in chats)):
                pending = (
                    Request(key, chat, generation.temperature(key.index, key.number), messages)
                    for chat, key, messages in list(
                        open_questions(chats, turn, generation.answers, journal)
                    )
                )
                async for answer in _answers(client, endpoint, pending, generation, refused):
                    journal.append([answer])
                    advance(1)


def _client(endpoint: Endpoint) -> openai.AsyncOpenAI:
    """OpenAI's client without its own retries, which know no broken answers, and redirects.

    Raises:
        ValueError: a key that no header can contain.
    """
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the key in {endpoint.key_variable} holds a line break, or a character that no header "
            "takes: set it again"
        )
    return openai.AsyncOpenAI(
        base_url=endpoint.url,
        api_key=key or _NO_KEY,
        max_retries=0,
        timeout=None,
        http_client=bounded_client(LONGEST_LINE, endpoint.concurrency),
    )


async def _answers(
    client: openai.AsyncOpenAI,
    endpoint: Endpoint,
    pending: Iterator[Request],
    generation: Generation,
    refused: list[Refused],
) -> AsyncIterator[dict[str, Any]]:
    """Answers as they arrive, with at most `concurrency` pending requests; refusals are added to
    `refused`.
    """

    def begin(count: int) -> set[asyncio.Task[dict[str, Any]]]:
        return {
            asyncio.ensure_future(_ask(client, endpoint, request, generation))
            for request in islice(pending, count)
        }

    # Each finished request is replaced by a new one, until one fails.
    running, failure = begin(endpoint.concurrency), None
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if error is None:
                yield task.result()
                continue
            if isinstance(error, Refused):
                refused.append(error)
            if isinstance(error, Refused) and len(refused) <= endpoint.refusals:
                logger.warning("left out: %s", error)
            else:
                failure = failure or error
        running |= begin(len(done)) if failure is None else set()
    # Answers of pending requests were still yielded; now the failure ends the run.
    if isinstance(failure, Refused):
        raise ValueError(
            f"endpoint.url {endpoint.url}: {failure}; what was answered is kept: run the same "
            f"command again, with endpoint.refusals above {endpoint.refusals} to do without such "
            "prompts"
        )
    if failure is not None:
        raise failure


async def _ask(
    client: openai.AsyncOpenAI, endpoint: Endpoint, request: Request, generation: Generation
) -> dict[str, Any]:
    # 1. The request; what the protocol lacks is sent beside its own keys.
    template = {**(endpoint.chat_template or {}), **(request.chat.template or {})}
    extra = {
        **(SERVED_NEUTRAL if endpoint.neutral else {}),
        **({TEMPLATE_ARGUMENTS: template} if template else {}),
        **({_TOKEN_IDS: True} if endpoint.token_ids else {}),
    }
    body = {
        "model": endpoint.model,
        "messages": [{k: turn[k] for k in _SENT if k in turn} for turn in request.messages],
        "max_tokens": generation.max_new_tokens,
        "temperature": request.temperature,
        "top_p": generation.top_p if request.temperature else 1.0,
        "seed": generation.seed_of(request.key),
        **({"tools": request.chat.tools} if request.chat.tools else {}),
    }
    # 2. A refusal because of our own keys needs another setting, not another prompt.
    try:
        choice, prompt = await _posted(client, endpoint, body, extra)
    except Refused as refused:
        for name, keys in (("neutral", SERVED_NEUTRAL), ("token_ids", (_TOKEN_IDS,))):
            unknown = next((key for key in keys if key in extra and key in str(refused)), None)
            if unknown:
                raise ValueError(
                    f"endpoint.url {endpoint.url}: {refused}: the server does not take {unknown}: "
                    f"set endpoint.{name} to false"
                    + (", if it applies nothing of a generation_config" * (name == "neutral"))
                ) from None
        place = request.chat.row.place
        raise Refused(f"prompt {request.key.index + 1}: {refused}", place) from None
    # 3. The answer as a line of the journal.
    message = choice["message"]
    reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), "")
    ids = {"response_ids": choice.get("token_ids"), "prompt_ids": prompt}
    return {
        **request.key._asdict(),
        "response": message["content"] or "",
        "temperature": request.temperature,
        "finished": choice.get("finish_reason") in ("stop", "tool_calls"),
        **{key: value for key, value in ids.items() if value and ids["response_ids"]},
        **({"reasoning_content": reasoning} if reasoning.strip() else {}),
        **({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}),
    }


async def _posted(
    client: openai.AsyncOpenAI, endpoint: Endpoint, body: dict[str, Any], extra: dict[str, Any]
) -> tuple[dict[str, Any], list[int] | None]:
    """The choice in the server's answer and the prompt's tokens, with retries after busy servers,
    broken connections and broken answers.
    """
    create = client.chat.completions.with_raw_response.create
    headers = {} if client.api_key != _NO_KEY else {"Authorization": openai.Omit()}
    for attempt in range(endpoint.retries + 1):
        try:
            answer = create(**body, extra_body=extra, extra_headers=headers)
            response = await asyncio.wait_for(answer, endpoint.timeout)
            return _choice(_json(response.http_response.content))
        # What cannot be repaired by repeating ends the loop.
        except openai.APIStatusError as error:
            code, trouble = error.status_code, _said(error)
            if 300 <= code < 400:
                raise ValueError(f"endpoint.url {endpoint.url}: {_redirected(error)}") from None
            if code in _OF_THE_PROMPT:
                raise Refused(trouble) from None
            if code not in _WORTH_RETRYING:
                break
        except Refused:
            raise
        except TooLong as error:
            raise Refused(str(error)) from None
        except asyncio.TimeoutError:
            trouble = f"no whole answer within {endpoint.timeout:g} seconds"
        except (openai.APIConnectionError, ValueError) as error:
            trouble = printable(str(error.__cause__ or error))
        if attempt < endpoint.retries:
            await asyncio.sleep(endpoint.wait * 2**attempt)
    raise ValueError(
        f"endpoint.url {endpoint.url}: {trouble}; what was answered is kept: run the same command "
        "again when the server is well"
    )


def _said(error: openai.APIStatusError) -> str:
    """The status and the beginning of an error's body, with credentials redacted."""
    text = error.response.content.decode(errors="replace")
    return f"{error.status_code} {printable(redacted(text))}"


def _redirected(error: openai.APIStatusError) -> str:
    place = printable(redacted(error.response.headers.get("location", "")))[:LONGEST_TROUBLE]
    return (
        f"the server redirects ({error.status_code}) to {place}: the key is not sent there, give "
        "that address if you trust it"
    )


def _json(body: bytes) -> Any:
    """The JSON value of an answer, with lone surrogates replaced. Raises ValueError if it is not
    JSON."""
    try:
        return clean(json.loads(body))
    except RecursionError:
        raise ValueError("an answer of JSON that is nested too deeply") from None


def _choice(answer: Any) -> tuple[dict[str, Any], list[int] | None]:
    """The first choice of an answer, whose message contains text or tool calls, and the tokens of
    the prompt.

    Raises:
        Refused: the message has neither.
        ValueError: it is no chat completion.
    """
    # The parts of a chat completion.
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message["content"] if not message.get("tool_calls") else message.get("content")
        if message.get("role", "assistant") not in ("assistant", None):
            raise TypeError
        token_ids(choice.get("token_ids"), "token_ids")
        prompt = token_ids(answer.get("prompt_token_ids"), "prompt_token_ids")
    except (KeyError, IndexError, TypeError, AttributeError, Skipped):
        raise ValueError(f"no chat completion: {redacted(json.dumps(answer))[:300]}") from None
    # A message without text, as after reasoning that took all tokens.
    if not isinstance(content, str) and not message.get("tool_calls"):
        reason = (
            " (all of max_new_tokens went into reasoning: raise it)"
            if any(message.get(key) for key in _REASONING)
            else ""
        )
        raise Refused(f"an answer without text{reason}: {redacted(json.dumps(message))[:300]}")
    return choice, prompt


# -- command line ----------------------------------------------------------------------------------


def answer_file(
    prompts: str,
    output: str,
    endpoint: Endpoint,
    limit: int | None = None,
    generation: Generation = DEFAULT_GENERATION,
) -> None:
    """Let a served target answer prompts.

    Args:
        prompts: file of prompts or chats (.jsonl, .json, .parquet), or a pattern of such.
        output: the `.jsonl` or `.jsonl.gz` to write.
        endpoint: the server that runs the target.
        limit: number of prompts, from the beginning.
        generation: settings of the answers.
    """
    tally = Tally("prompt")
    regenerate_by(endpoint, prompt_rows(prompts, limit, tally), output, generation, tally)
    print(summary(output, sum(1 for _ in read_jsonl(Path(output))), tally))


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and request the answers; returns the exit status."""
    parser = config_parser(
        "python -m data.endpoint", "Let a target that a server runs answer prompts."
    )
    parser.add_function_arguments(answer_file, fail_untyped=True)
    built = vars(parser.instantiate(parse(parser, arguments)))
    answer_file(**{name: built[name] for name in inspect.signature(answer_file).parameters})
    return 0


if __name__ == "__main__":
    exit_with(command)

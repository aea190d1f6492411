"""Answers from a server with the OpenAI chat protocol (vLLM, SGLang, llama.cpp, …) that runs the
target.

A drafter must learn its own target's answers, so the server must run exactly that target. The
server applies its chat template and returns text: rows have no `response_ids`.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from configs.command_line.loading import config_parser, exit_with, parse
from configs.command_line.redaction import printable, redacted
from data.generation.answering import (
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
from data.generation.requests import Redirected, Trouble, post
from data.reading.files import LONGEST_LINE, Place, Row, Tally, clean, read_jsonl
from data.reading.rows import Message
from data.regenerate import Generation
from modules.target.generation_config import SERVED_NEUTRAL

logger = logging.getLogger(__name__)

DEFAULT_GENERATION = Generation()
_WORTH_RETRYING = (408, 409, 425, 429, 500, 502, 503, 504)
_OF_THE_PROMPT = (400, 413, 422)
"""Statuses of a refused prompt, for instance because it is longer than the context."""
_REASONING = ("reasoning_content", "reasoning")
"""Keys of the reasoning in answers of servers with a reasoning parser."""


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
            which vLLM and SGLang read), as in the recipe that trains on the answers.
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
    """A request for one answer. place: of its prompt, for messages."""

    key: Key
    place: Place
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
    when the run has to end; an interrupted run only requests the rest. Reasoning that the server
    returns separately is stored in the answer's turn as `reasoning_content`.

    Raises:
        ValueError: the output exists, no prompt can be answered, the journal belongs to other
            settings, or the server refuses more than `endpoint.refusals` requests or still fails
            after the retries.
    """
    tally = Tally("prompt") if tally is None else tally
    with making(Path(output)) as place:
        # 1. Read the prompts, and continue a journal with the same settings.
        chats = chats_of(prompts, tally)
        settings = {
            "target": endpoint.model,
            "prompts": prompts_digest([row.content for row in prompts]),
            "neutral": endpoint.neutral,
            "chat_template": endpoint.chat_template or None,
            **generation.settings(),
        }
        journal = Journal(place.with_name(place.name + ".journal"), settings)
        # 2. Turn by turn, because a question follows the answers before it.
        refused: list[Refused] = []
        with ThreadPoolExecutor(endpoint.concurrency) as pool:
            for turn in range(max(len(chat.questions) for chat in chats)):
                pending = (
                    Request(
                        key, chat.row.place, generation.temperature(key.index, key.number), messages
                    )
                    for chat, key, messages in list(
                        open_questions(chats, turn, generation.answers, journal)
                    )
                )
                for answer in _answers(pool, endpoint, pending, generation, refused):
                    journal.append([answer])
        # 3. Count refusals, and write the rows.
        for refusal in refused:
            tally.skip("refused by the server", refusal.place)
        if not journal.answers:
            raise ValueError(f"no prompt can be answered: {tally.reasons()}")
        write_answers(place, chats, generation.answers, journal, tally)
    return place


def _answers(
    pool: ThreadPoolExecutor,
    endpoint: Endpoint,
    pending: Iterator[Request],
    generation: Generation,
    refused: list[Refused],
) -> Iterator[dict[str, Any]]:
    """Answers as they arrive, with at most `concurrency` pending requests; refusals are added to
    `refused`.
    """

    def begin(count: int) -> set[Future[dict[str, Any]]]:
        return {
            pool.submit(_ask, endpoint, request, generation) for request in islice(pending, count)
        }

    # Each finished request is replaced by a new one, until one fails.
    running, failure = begin(endpoint.concurrency), None
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            error = future.exception()
            if error is None:
                yield future.result()
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


def _ask(endpoint: Endpoint, request: Request, generation: Generation) -> dict[str, Any]:
    # The request, without keys of turns that the protocol lacks.
    said = [
        {key: turn[key] for key in ("role", "content", "name") if key in turn}
        for turn in request.messages
    ]
    body = {
        "model": endpoint.model,
        "messages": said,
        "max_tokens": generation.max_new_tokens,
        "temperature": request.temperature,
        "top_p": generation.top_p if request.temperature else 1.0,
        "seed": generation.seed_of(request.key),
        **(SERVED_NEUTRAL if endpoint.neutral else {}),
    }
    if endpoint.chat_template:
        body["chat_template_kwargs"] = endpoint.chat_template
    # A refusal because of our own keys needs another setting, not another prompt.
    try:
        choice = _posted(endpoint, body)
    except Refused as refused:
        unknown = [key for key in SERVED_NEUTRAL if endpoint.neutral and key in str(refused)]
        if unknown:
            raise ValueError(
                f"endpoint.url {endpoint.url}: {refused}: the server does not take {unknown[0]}: "
                "set endpoint.neutral to false, if it applies nothing of a generation_config"
            ) from None
        raise Refused(f"prompt {request.key.index + 1}: {refused}", request.place) from None
    # The answer as a line of the journal.
    message = choice["message"]
    reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), "")
    return {
        **request.key._asdict(),
        "response": message["content"],
        "temperature": request.temperature,
        "finished": choice.get("finish_reason") == "stop",
        **({"reasoning_content": reasoning} if reasoning.strip() else {}),
    }


def _posted(endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
    """The choice in the server's answer, with retries after busy servers, broken connections and
    broken answers.
    """
    headers = {"Content-Type": "application/json", **_authorization(endpoint)}
    address = endpoint.url.rstrip("/") + "/chat/completions"
    for attempt in range(endpoint.retries + 1):
        try:
            return _choice(
                _json(
                    *post(
                        address,
                        json.dumps(body).encode(),
                        headers,
                        endpoint.timeout,
                        LONGEST_LINE + 1,
                    )
                )
            )
        # What cannot be repaired by repeating ends the loop.
        except Trouble as error:
            trouble = str(error)
            if error.code in _OF_THE_PROMPT:
                raise Refused(trouble) from None
            if error.code not in _WORTH_RETRYING:
                break
        except Refused:
            raise
        except Redirected as redirected:
            raise ValueError(f"endpoint.url {endpoint.url}: {redirected}") from None
        except (OSError, HTTPException, ValueError) as error:
            trouble = printable(str(error))
        if attempt < endpoint.retries:
            time.sleep(endpoint.wait * 2**attempt)
    raise ValueError(
        f"endpoint.url {endpoint.url}: {trouble}; what was answered is kept: run the same command "
        "again when the server is well"
    )


def _authorization(endpoint: Endpoint) -> dict[str, str]:
    """The header with the key, if any. Raises ValueError for a key that no header can contain."""
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the key in {endpoint.key_variable} holds a line break, or a character that no header "
            "takes: set it again"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def _json(body: bytes, whole: bool) -> Any:
    """The JSON value of an answer, with lone surrogates replaced.

    Raises:
        Refused: the answer is too long.
        ValueError: it is not JSON, or truncated.
    """
    if len(body) > LONGEST_LINE:
        raise Refused(f"an answer of more than {LONGEST_LINE >> 20} MiB")
    if not whole:
        raise ValueError("an answer that is cut off")
    try:
        return clean(json.loads(body))
    except RecursionError:
        raise ValueError("an answer of JSON that is nested too deeply") from None


def _choice(answer: Any) -> dict[str, Any]:
    """The first choice of an answer, whose message contains text.

    Raises:
        Refused: the message has no text.
        ValueError: it is no chat completion.
    """
    # The parts of a chat completion.
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
        if message.get("role", "assistant") not in ("assistant", None):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"no chat completion: {redacted(json.dumps(answer))[:300]}") from None
    # A message without text, as after reasoning that took all tokens.
    if not isinstance(content, str):
        reason = (
            " (all of max_new_tokens went into reasoning: raise it)"
            if any(message.get(key) for key in _REASONING)
            else ""
        )
        raise Refused(f"an answer without text{reason}: {redacted(json.dumps(message))[:300]}")
    return answer["choices"][0]


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

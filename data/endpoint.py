"""Answers from any server that speaks the OpenAI chat protocol (vLLM, SGLang, llama.cpp, …): the
target, served.

A drafter is to learn what its own target says, so the server must run that very target. Its chat
template is the server's, and what comes back is text: rows carry no `response_ids`.
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
"""What servers say to a prompt that they will not take, for instance because it is longer than the
context.
"""
_REASONING = ("reasoning_content", "reasoning")
"""Where servers with a reasoning parser put what is thought before the answer."""


@dataclass(frozen=True)
class Endpoint:
    """Where the target is served.

    Args:
        url: up to `/v1`, for instance http://127.0.0.1:8000/v1.
        model: what the server calls it.
        concurrency: requests under way at a time.
        retries: further attempts after a busy or broken answer, each after twice the wait of the
            one before.
        wait: seconds before the first of them.
        timeout: seconds that connecting may take, and as many again that the answer may take in
            all.
        key_variable: environment variable with the key, if the server wants one.
        refusals: answers that the server may refuse (a prompt that is too long, say) before the run
            ends; the output is then without them.
        neutral: ask for repetition_penalty 1, min_p 0 and top_k -1 too, which vLLM and SGLang
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
        """Refuse what is no address, and values that cannot work."""
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
    """The server will not answer this prompt; others it may. place: where the prompt stands."""

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason)
        self.place = place


class Request(NamedTuple):
    """One answer to ask for. place: of its prompt, for messages."""

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

    Every answer goes to a journal beside the output as it arrives, those too that are under way
    when the run has to end; an interrupted run asks only for the rest. Reasoning that the server
    gives beside the answer stands in the answer's turn as `reasoning_content`.

    Raises:
        ValueError: the output exists, no prompt can be answered, the journal belongs to other
            settings, or the server refuses more than `endpoint.refusals` requests or goes on
            failing after the retries.
    """
    tally = Tally("prompt") if tally is None else tally
    with making(Path(output)) as place:
        chats = chats_of(prompts, tally)
        settings = {
            "target": endpoint.model,
            "prompts": prompts_digest([row.content for row in prompts]),
            "neutral": endpoint.neutral,
            "chat_template": endpoint.chat_template or None,
            **generation.settings(),
        }
        journal = Journal(place.with_name(place.name + ".journal"), settings)
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
        for one in refused:
            tally.skip("refused by the server", one.place)
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
    """Answers as they come, with never more than `concurrency` requests begun; refusals are added
    to `refused`.
    """

    def begin(count: int) -> set[Future[dict[str, Any]]]:
        return {
            pool.submit(_ask, endpoint, request, generation) for request in islice(pending, count)
        }

    running, failure = begin(endpoint.concurrency), None
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            found = future.exception()
            if found is None:
                yield future.result()
                continue
            if isinstance(found, Refused):
                refused.append(found)
            if isinstance(found, Refused) and len(refused) <= endpoint.refusals:
                logger.warning("left out: %s", found)
            else:
                failure = failure or found
        running |= begin(len(done)) if failure is None else set()
    if isinstance(failure, Refused):
        raise ValueError(
            f"endpoint.url {endpoint.url}: {failure}; what was answered is kept: run the same "
            f"command again, with endpoint.refusals above {endpoint.refusals} to do without such "
            "prompts"
        )
    if failure is not None:
        raise failure


def _ask(endpoint: Endpoint, request: Request, generation: Generation) -> dict[str, Any]:
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
    """The choice in the server's answer; busy servers, broken connections and broken answers are
    tried again.
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
    """The header with the key, if there is a key. ValueError: no header can hold it."""
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the key in {endpoint.key_variable} holds a line break, or a character that no header "
            "takes: set it anew"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def _json(body: bytes, whole: bool) -> Any:
    """What an answer holds, lone surrogates replaced. `Refused`: it is too long. ValueError: no
    JSON.
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
    """The first choice, with text in its message. `Refused` where there is none; ValueError: no
    such answer.
    """
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
        if message.get("role", "assistant") not in ("assistant", None):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"no chat completion: {redacted(json.dumps(answer))[:300]}") from None
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
        endpoint: where the target is served.
        limit: answer only the first so many prompts.
        generation: how answers are made.
    """
    tally = Tally("prompt")
    regenerate_by(endpoint, prompt_rows(prompts, limit, tally), output, generation, tally)
    print(summary(output, sum(1 for _ in read_jsonl(Path(output))), tally))


def command(arguments: Sequence[str]) -> int:
    """Parse and ask."""
    parser = config_parser(
        "python -m data.endpoint", "Let a target that a server runs answer prompts."
    )
    parser.add_function_arguments(answer_file, fail_untyped=True)
    built = vars(parser.instantiate(parse(parser, arguments)))
    answer_file(**{name: built[name] for name in inspect.signature(answer_file).parameters})
    return 0


if __name__ == "__main__":
    exit_with(command)

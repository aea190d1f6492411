"""Answers from any server that speaks the OpenAI chat protocol (vLLM, SGLang, llama.cpp, …): the target, served.

A drafter is to learn what its own target says, so the server must run that very target. Its chat template is the
server's, and what comes back is text: rows carry no `response_ids`.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data.configfiles import config_parser, parse, run
from data.files import read_jsonl
from data.regenerate import (
    Generation,
    Journal,
    answered_row,
    messages_of,
    prompt_rows,
    prompts_digest,
    writable,
    write_rows,
)
from modules.core.generation import SERVED_NEUTRAL

logger = logging.getLogger(__name__)

DEFAULT_GENERATION = Generation()
_WORTH_RETRYING = (408, 409, 425, 429, 500, 502, 503, 504)
_OF_THE_PROMPT = (400, 413, 422)
"""What servers say to a prompt that they will not take, for instance because it is longer than the context."""


@dataclass(frozen=True)
class Endpoint:
    """Where the target is served.

    Args:
        url: up to `/v1`, for instance http://127.0.0.1:8000/v1.
        model: what the server calls it.
        concurrency: requests under way at a time.
        retries: further attempts after a busy or broken answer, each after twice the wait of the one before.
        wait: seconds before the first of them.
        timeout: seconds that one request may take.
        key_variable: environment variable with the key, if the server wants one.
        refusals: answers that the server may refuse (a prompt that is too long, say) before the run ends; the output is
            then without them.
        neutral: ask for repetition_penalty 1, min_p 0 and top_k -1 too, which vLLM and SGLang
            otherwise take from the model's `generation_config`; false for a server that refuses
            these keys.
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

    def __post_init__(self) -> None:
        """Refuse what is no address, and values that cannot work."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint.url must begin with http:// or https://, got {self.url!r}")
        for name, least in (("concurrency", 1), ("retries", 0), ("wait", 0), ("timeout", 0.001), ("refusals", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"endpoint.{name} must be {least} or above, got {getattr(self, name)}")


class Refused(ValueError):
    """The server will not answer this prompt; others it may."""


class Request(NamedTuple):
    """One answer to ask for."""

    index: int
    number: int
    temperature: float
    messages: list[Any]


def regenerate_by(endpoint: Endpoint, prompts: Sequence[dict[str, Any]], output: str | Path,
                  generation: Generation = DEFAULT_GENERATION) -> Path:
    """Answer `prompts` through a server and write one JSONL row per answer, as `data.regenerate.regenerate` does.

    Every answer goes to a journal beside the output as it arrives, those too that are under way when the run has to
    end; an interrupted run asks only for the rest.

    Raises:
        ValueError: the output exists, a prompt is of an unknown shape, the journal belongs to other settings, or the
            server refuses more than `endpoint.refusals` requests or goes on failing after the retries.
    """
    output = writable(Path(output))
    settings = {"target": f"{endpoint.model} at {endpoint.url}", "prompts": prompts_digest(prompts),
                "neutral": endpoint.neutral, **generation.settings()}
    journal = Journal(output.with_name(output.name + ".journal"), settings)
    requests = [Request(index, number, generation.temperature(index, number), messages_of(row, index))
                for index, row in enumerate(prompts) for number in range(generation.answers)]
    pending = (request for request in requests if (request.index, request.number) not in journal.answers)
    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        for answer in _answers(pool, endpoint, pending, generation):
            journal.append([answer])
    write_rows(output, [answered_row(prompts[request.index], journal.answers[request.index, request.number])
                        for request in requests if (request.index, request.number) in journal.answers])
    journal.path.unlink()
    return output


def _answers(pool: ThreadPoolExecutor, endpoint: Endpoint, pending: Iterator[Request], generation: Generation
             ) -> Iterator[dict[str, Any]]:
    """Answers as they come, with never more than `concurrency` requests begun."""
    def begin(count: int) -> set[Future[dict[str, Any]]]:
        return {pool.submit(_ask, endpoint, request, generation) for request in islice(pending, count)}

    running, refused, failure = begin(endpoint.concurrency), 0, None
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            found = future.exception()
            if found is None:
                yield future.result()
                continue
            refused += isinstance(found, Refused)
            if isinstance(found, Refused) and refused <= endpoint.refusals:
                logger.warning("left out: %s", found)
            else:
                failure = failure or found
        running |= begin(len(done)) if failure is None else set()
    if isinstance(failure, Refused):
        raise ValueError(f"endpoint.url {endpoint.url}: {failure}; what was answered is kept: run the same command "
                         f"again, with endpoint.refusals above {endpoint.refusals} to do without such prompts")
    if failure is not None:
        raise failure


def _ask(endpoint: Endpoint, request: Request, generation: Generation) -> dict[str, Any]:
    body = {"model": endpoint.model, "messages": request.messages, "max_tokens": generation.max_new_tokens,
            "temperature": request.temperature, "top_p": generation.top_p if request.temperature else 1.0,
            "seed": generation.seed + 1_000_003 * request.index + request.number,
            **(SERVED_NEUTRAL if endpoint.neutral else {})}
    try:
        choice = _posted(endpoint, body)
    except Refused as refused:
        unknown = [key for key in SERVED_NEUTRAL if endpoint.neutral and key in str(refused)]
        if unknown:
            raise ValueError(
                f"endpoint.url {endpoint.url}: {refused}: the server does not take {unknown[0]}: "
                "set endpoint.neutral to false, if it applies nothing of a generation_config"
            ) from None
        raise Refused(f"prompt {request.index + 1}: {refused}") from None
    return {"index": request.index, "number": request.number, "response": choice["message"]["content"],
            "temperature": request.temperature, "finished": choice.get("finish_reason") == "stop"}


def _posted(endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
    """The choice in the server's answer; busy servers, broken connections and broken answers are tried again."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get(endpoint.key_variable):
        headers["Authorization"] = f"Bearer {os.environ[endpoint.key_variable]}"
    address = endpoint.url.rstrip("/") + "/chat/completions"
    for attempt in range(endpoint.retries + 1):
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
                return _choice(json.load(response))
        except urllib.error.HTTPError as error:
            trouble = f"{error.code} {_said(error)}"
            if error.code in _OF_THE_PROMPT:
                raise Refused(trouble) from None
            if error.code not in _WORTH_RETRYING:
                break
        except Refused:
            raise
        except (OSError, HTTPException, ValueError) as error:
            trouble = f"{error}"
        if attempt < endpoint.retries:
            time.sleep(endpoint.wait * 2 ** attempt)
    raise ValueError(f"endpoint.url {endpoint.url}: {trouble}; what was answered is kept: run the same command again "
                     "when the server is well")


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with a status, as far as it came."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, HTTPException):
        return "(and nothing more)"


def _choice(answer: Any) -> dict[str, Any]:
    """The first choice, with text in its message. `Refused` where there is none; ValueError: no such answer."""
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {json.dumps(answer)[:300]}") from None
    if not isinstance(content, str):
        raise Refused(f"an answer without text: {json.dumps(message)[:300]}")
    return answer["choices"][0]


# -- command line -----------------------------------------------------------------------------------------------


def answer_file(prompts: str, output: str, endpoint: Endpoint, limit: int | None = None,
                generation: Generation = DEFAULT_GENERATION) -> None:
    """Let a served target answer prompts.

    Args:
        prompts: JSONL file of rows with `prompt`, `question` or `messages`.
        output: the `.jsonl` or `.jsonl.gz` to write.
        endpoint: where the target is served.
        limit: answer only the first so many prompts.
        generation: how answers are made.
    """
    rows = prompt_rows(prompts, limit)
    regenerate_by(endpoint, rows, output, generation)
    print(f"{sum(1 for _ in read_jsonl(Path(output)))} answers: {output}")


def command(arguments: Sequence[str]) -> int:
    """Parse and ask."""
    parser = config_parser("python -m data.endpoint", "Let a target that a server runs answer prompts.")
    parser.add_function_arguments(answer_file, fail_untyped=True)
    built = vars(parser.instantiate(parse(parser, arguments)))
    answer_file(**{name: built[name] for name in inspect.signature(answer_file).parameters})
    return 0


if __name__ == "__main__":
    sys.exit(run(command, sys.argv[1:]))

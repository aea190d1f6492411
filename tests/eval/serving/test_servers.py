"""Load tests of running servers: this project's endpoint, and one that fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from checkpoints.reports import load_report
from eval.cli import command
from eval.evaluation import Evaluation, evaluate
from eval.report.compare import comparison_lines, comparison_table
from eval.serving.settings import Serving
from tests.train.online.conftest import make_service, markov_target, small_drafter
from train.online.server import Endpoint
from train.online.settings import LearningSettings

SECONDS = 20.0
NEVER = LearningSettings(interval=1000, lr=1e-3)


@contextmanager
def served(application: Any) -> Iterator[str]:
    """An application on a free port, and its address."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(SECONDS)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"id": i, "category": "ab"[i % 2], "turns": [text]}
        for i, text in enumerate(("abc", "mde", "xyz"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_an_endpoint_with_and_without_its_drafter(prompts: str, tmp_path: Path) -> None:
    """Texts are equal, since both decode losslessly; τ is what the endpoint's answers say."""
    target = markov_target()
    services = [
        make_service(target, small_drafter(target, seed), tmp_path / str(seed), NEVER,
                     temperature=0.0)
        for seed in (3, 4)
    ]  # fmt: skip
    endpoints = [Endpoint(service, "tiny") for service in services]
    serving = {"concurrency": [1, 2], "request_rate": [200.0], "requests": 3, "warm_up": 1}
    with served(endpoints[0].application) as url, served(endpoints[1].application) as other:
        report = evaluate(
            Evaluation(
                engine="openai",
                url=url,
                serving=Serving(baseline_url=other, **serving),
                prompts=[prompts],
                max_new_tokens=6,
            ),
            tmp_path / "out",
            console=Console(quiet=True),
        )
    for endpoint in endpoints:
        endpoint.close()
    again = load_report(tmp_path / "out")
    assert [row["name"] for row in again["methods"]] == [
        f"{name}{load}"
        for load in (", 1 at once", ", 2 at once", " at 200 requests/s")
        for name in ("autoregressive", "served")
    ]
    for row in report["methods"]:
        assert row["serving"]["failed"] == 0 and row["serving"]["tokens_counted_by"] == "server"
        assert row["new_tokens"] == 18 and row["serving"]["same_text"] == 3
        assert row["target"] == "tiny" and row["serving"]["time_to_first_token"]["p50"] > 0
    # What /metrics said about each load adds up to the answers' own, warm-ups left out.
    told = [row["serving"]["drafts"] for row in report["methods"] if row["name"][0] == "s"]
    counted, warm = endpoints[0].drafts, 3
    assert sum(each["drafted"] for each in told) < counted.tokens
    assert services[0].lines and len(services[0].lines) == 9 + warm
    assert counted.accepted >= sum(each["accepted"] for each in told)
    shares = counted.by_position
    assert all(a >= b for a, b in zip(shares, shares[1:])) and sum(shares) == counted.accepted
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Latency against throughput" in page
    comparison_table(again, again)
    assert list(comparison_lines(again, again))


def failing(statuses: list[int]) -> Starlette:
    """Streams two pieces without usage, or fails with the next status."""

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(request: Request) -> Any:
        body = await request.json()
        assert body["stream"] and body["stream_options"] == {"include_usage": True}
        status = statuses.pop(0) if statuses else 200
        if status != 200:
            return JSONResponse({"error": {"message": f"no {status}"}}, status)

        async def events() -> Any:
            for word in ("one", " two"):
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                event = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
                yield f"data: {json.dumps({**event, 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    routes = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def words(url: str, prompts: str, output: Path, *more: str) -> list[str]:
    flags = ["--serving.warm_up", "0", "--serving.requests", "3", "--output", str(output)]
    return ["--engine", "openai", "--url", url, "--prompts", prompts, *flags, *more]


def test_failed_requests_are_counted(prompts: str, tmp_path: Path, capsys) -> None:
    flags = ("--serving.concurrency", "[1]")
    with served(failing([200, 503])) as url:
        assert command(words(url, prompts, tmp_path / "out", *flags)) == 0
    (row,) = load_report(tmp_path / "out")["methods"]
    assert row["serving"]["failed"] == 1 and row["prompts"] == 2 and row["new_tokens"] == 4
    assert row["serving"]["tokens_counted_by"] == "pieces of text"
    assert row["speedup"]["micro"] is None and row["mean_accepted_tokens"] is None
    assert "1 failed: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "more", "message"),
    [
        ([500] * 3, [], "none of 3 requests was answered"),
        ([], ["--serving.model", "other"], "lists m: give one of them as serving.model"),
        ([], ["--resume"], "a load test is measured in one go"),
        ([], ["--drafters", "runs/x"], "asks a server as it runs: leave out drafters"),
        ([], ["--temperature", "[0, 1]"], "asks a server as it runs"),
    ],
)
def test_mistakes_are_one_line(
    prompts: str, tmp_path: Path, statuses: list[int], more: list[str], message: str
) -> None:
    with served(failing(statuses)) as url, pytest.raises(ValueError, match=message) as caught:
        command(words(url, prompts, tmp_path / "out", "--serving.concurrency", "[1]", *more))
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_and_keys_of_another_engine(
    prompts: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="url http://127.0.0.1:9/v1: .*is the server running"):
        command(words("http://127.0.0.1:9/v1", prompts, tmp_path / "out"))
    with pytest.raises(ValueError, match="url and serving are for engine 'openai'"):
        command(["--url", "http://127.0.0.1:9/v1", "--prompts", prompts])

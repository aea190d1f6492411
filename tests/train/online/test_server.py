"""The endpoint: answers are plain decoding's, updates block none, and nothing accepted is lost."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

import uvicorn

from configs.command_line.endings import Stopped
from configs.command_line.loading import run
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.target import Target
from tests.ports import free_port
from tests.train.online.conftest import make_service, small_drafter
from train.online.server import Endpoint
from train.online.service import Service
from train.online.settings import LearningSettings

SETTINGS = LearningSettings(interval=2, lr=1e-2)
BODY = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 6}
SECONDS = 20.0
JSON = {"Content-Type": "application/json; charset=utf-8"}


@contextmanager
def served(endpoint: Endpoint) -> Iterator[int]:
    """The endpoint on a free port, in a thread; closed at the end."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        server = uvicorn.Server(uvicorn.Config(endpoint.application, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            yield place.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            endpoint.close()


def ask(
    port: int, body: Any, path: str = "/v1/chat/completions", headers: dict[str, str] = JSON
) -> tuple[int, str]:
    """Status and text of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    text = body if isinstance(body, str) else json.dumps(body)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, text, headers)
    response = connection.getresponse()
    status, content = response.status, response.read().decode()
    connection.close()
    return status, content


@pytest.fixture
def service(markov: Target, tmp_path: Path) -> Service:
    return make_service(markov, small_drafter(markov), tmp_path, SETTINGS, temperature=0.0)


def test_answers_are_those_of_plain_decoding(service: Service, markov: Target) -> None:
    """Whole and streamed, with the usual fields."""
    with served(Endpoint(service, "tiny")) as port:
        whole = json.loads(ask(port, BODY)[1])
        events = ask(port, {**BODY, "stream": True, "metadata": {"topic": 7}})[1].split("\n\n")
        models = json.loads(ask(port, None, "/v1/models")[1])
    ids = markov.tokenizer("abc")["input_ids"]
    expected = SpeculativeDecoder(markov).decode([ids], Sampling(), 6)[0].ids
    text = markov.tokenizer.decode(expected)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and len(deltas) > 3
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert models["data"][0]["id"] == "tiny"
    written = [json.loads(line) for line in service.file.read_text().splitlines()]
    assert [line["response_ids"] for line in written] == [expected, expected]
    assert written[1]["labels"] == {"topic": "7"} and "response" not in service.lines[1]


def test_a_seed_decides_a_sampled_answer(service: Service) -> None:
    hot = {**BODY, "temperature": 1.5, "top_p": 0.9}
    with served(Endpoint(service, "tiny")) as port:
        texts = [
            json.loads(ask(port, {**hot, **more})[1])["choices"][0]["message"]["content"]
            for more in ({"seed": 3}, {"seed": 3}, {}, {})
        ]
    assert texts[0] == texts[1] and len(set(texts)) == 3


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "a list": ([], "not a JSON object"),
    "no messages": ({}, "messages must be a list"),
    "a role": ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
    "several": ({**BODY, "n": 2}, "n is not supported, got 2"),
    "tools": ({**BODY, "tools": [{}]}, "tools is not supported"),
    "a stop": ({**BODY, "stop": ["x"]}, "stop is not supported"),
    "a text": ({**BODY, "temperature": "hot"}, "temperature must be a number, got 'hot'"),
    "a seed": ({**BODY, "seed": 1 << 70}, "seed must be at least 0 and below"),
    "cold": ({**BODY, "temperature": -1}, "temperature must be 0"),
    "a limit": ({**BODY, "max_tokens": 0}, "max_tokens must be a whole number above 0"),
    "a long answer": ({**BODY, "max_tokens": 600}, "exceed the target's context of 512"),
    "metadata": ({**BODY, "metadata": 3}, "metadata must be an object"),
}


def test_what_cannot_be_answered_is_named(service: Service) -> None:
    with served(Endpoint(service, "tiny")) as port:
        for body, words in BAD.values():
            status, text = ask(port, body)
            assert status == 400 and words in json.loads(text)["error"]["message"], (body, text)
        assert "content-type" in ask(port, BODY, headers={"Content-Type": "text/plain"})[1]
        assert ask(port, {**BODY, "n": 1, "stop": None, "user": "me"})[0] == 200
    assert len(service.lines) == 1


def test_requests_during_an_update_are_answered(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that hangs holds up nothing, and what came meanwhile is learnt after it."""
    learner = service.learners["drafter"]
    begun, go_on, step = threading.Event(), threading.Event(), learner._step

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(SECONDS)
        return step(*arguments)

    monkeypatch.setattr(learner, "_step", slow)
    with served(Endpoint(service, "tiny")) as port:
        first = [ask(port, BODY)[0] for _ in range(2)]
        assert begun.wait(SECONDS)
        during = [ask(port, BODY)[0] for _ in range(5)]
        assert learner.updates == 0 and len(service.lines) == 7
        go_on.set()
    assert first + during == [200] * 7
    # Two of the seven wait for one more; every other request was learnt once.
    assert learner.updates == 3 and learner.buffer.consumed == 5
    assert [item.number for item in learner.buffer.waiting] == [6]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_loses_nothing(
    stream: bool, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is answered to its end, recorded and learnt from."""
    begun, answer = threading.Event(), service.answer

    def accepted(*arguments: Any) -> Any:
        begun.set()
        return answer(*arguments)

    monkeypatch.setattr(service, "answer", accepted)
    with served(Endpoint(service, "tiny")) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        body = json.dumps({**BODY, "max_tokens": 60, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, JSON)
        assert begun.wait(SECONDS)
        connection.close()
    assert [line["tokens"] for line in service.lines] == [60]
    assert len(service.learners["drafter"].buffer.waiting) == 1


def test_a_failed_update_does_not_end_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.learners["drafter"], "_step", broken)
    endpoint = Endpoint(service, "tiny")
    with served(endpoint) as port:
        assert [ask(port, BODY)[0] for _ in range(4)] == [200] * 4
    assert str(endpoint.trouble) == "out of memory" and len(service.lines) == 4


def test_a_signal_ends_with_a_drafter_and_a_report(
    serve: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Through the command; the run can go on."""
    statuses, run_server = [], uvicorn.Server.run

    def three_requests(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        """Serve in a thread, which gets no signals, then be stopped by one."""
        thread = threading.Thread(target=run_server, args=(server, sockets))
        thread.start()
        statuses.extend(ask(sockets[0].getsockname()[1], BODY)[0] for _ in range(3))
        server.should_exit = True
        thread.join(SECONDS)
        raise Stopped(15)

    monkeypatch.setattr("uvicorn.Server.run", three_requests)
    port = str(free_port())
    assert run(lambda _: serve("--server.port", port), []) == 143
    assert "go on with --resume" in capsys.readouterr().err and statuses == [200] * 3
    output = tmp_path / "run"
    assert (output / "drafter" / "model.safetensors").exists()
    assert json.loads((output / "report.json").read_text())["requests"] == 3
    assert run(lambda _: serve("--server.port", str(free_port()), "--resume"), []) == 143
    assert json.loads((output / "report.json").read_text())["requests"] == 6


def test_a_port_in_use_is_refused(
    serve: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
        assert run(lambda _: serve("--server.port", str(port)), []) == 2
    assert f"server.port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_libraries_are_named(
    serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("train.online.__main__.importlib.util.find_spec", lambda name: None)
    assert run(lambda _: serve("--server.port", str(free_port())), []) == 2
    assert "server.port needs starlette, which is not installed" in capsys.readouterr().err

"""Answers from a local server that is at times busy, slow or gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from configs.command_line.loading import run as one_line_run
from data.endpoint import Endpoint, command, regenerate_by
from data.generation.answering import placed
from data.reading.files import Tally, read_jsonl
from data.reading.rows import load_conversations
from data.regenerate import Generation
from tests.ports import serving

PROMPTS = placed([{"category": "test", "prompt": f"number {i}"} for i in range(6)])


class Server(ThreadingHTTPServer):
    """Answers with the prompt in capitals; every request whose count is in `trouble` gets that
    status, or a whole answer with something wrong: `cut` half-way, with no `choices`, or with
    `null` for its text. Requests with an `unknown` key are refused; `raw` are whole answers by
    count."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble: dict[int, int | str] = {}
        self.unknown: tuple[str, ...] = ()
        self.raw: dict[int, bytes] = {}
        self.asked: list[dict[str, Any]] = []
        self.running = self.most = 0
        self.meanwhile: Callable[[int], object] = lambda count: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            count = len(server.asked)
            trouble = server.trouble.get(count, 200)
            status = trouble if isinstance(trouble, int) else 200
            server.running += 1
            server.most = max(server.most, server.running)
        server.meanwhile(count)
        time.sleep(0.02)
        text = None if trouble == "null" else body["messages"][-1]["content"].upper()
        unknown = [key for key in body if key in server.unknown]
        status = 400 if unknown else status
        answer = {
            "choices": [
                {"message": {"content": text}, "finish_reason": "stop" if status == 200 else None}
            ]
        }
        whole = status == 200 and trouble != "choices"
        error = f"unrecognised: {unknown[0]}" if unknown else "trouble"
        content = json.dumps(answer if whole else {"error": error}).encode()
        with server.lock:
            content = server.raw.get(count, content)
            server.running -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if trouble in ("cut", 501) else content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = serving(made)
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def endpoint(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(
        **{"url": server.url, "model": "tiny", "concurrency": 3, "wait": 0.001, **changes}
    )


def test_answers_come_in_the_order_of_the_prompts_and_are_conversations(
    server: Server, tmp_path: Path
) -> None:
    output = regenerate_by(
        endpoint(server), PROMPTS, tmp_path / "answers.jsonl", Generation(answers=2)
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["response"] for row in rows] == [f"NUMBER {i}" for i in range(6) for _ in range(2)]
    assert rows[0] == {
        **PROMPTS[0].content,
        "response": "NUMBER 0",
        "temperature": 0.0,
        "finished": True,
    }
    assert 1 < server.most <= 3 and {body["model"] for body in server.asked} == {"tiny"}
    assert len({body["seed"] for body in server.asked}) == 12
    assert sum(1 for _ in load_conversations(str(output))) == 12 and list(tmp_path.iterdir()) == [
        output
    ]


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.trouble = {1: 503, 2: 429, 4: 500}
    regenerate_by(endpoint(server), PROMPTS, tmp_path / "answers.jsonl")
    assert len(server.asked) == len(PROMPTS) + 3


def test_a_broken_answer_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.trouble = {1: "cut", 2: "choices", 4: "cut"}
    output = regenerate_by(endpoint(server), PROMPTS, tmp_path / "answers.jsonl")
    assert [row["response"] for row in read_jsonl(output)] == [f"NUMBER {i}" for i in range(6)]
    assert len(server.asked) == len(PROMPTS) + 3


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("cut", "complete message"),
        ("choices", "no chat completion: .*trouble"),
        (501, "501"),
        (404, "404 .*trouble"),
    ],
)
def test_a_server_that_stays_broken_is_named_in_one_line(
    server: Server, tmp_path: Path, trouble: int | str, words: str
) -> None:
    server.trouble = dict.fromkeys(range(1, 100), trouble)
    with pytest.raises(
        ValueError, match=f"endpoint.url http.*({words}).*: run the same command again when"
    ) as caught:
        regenerate_by(
            endpoint(server, retries=1, refusals=100), PROMPTS, tmp_path / "answers.jsonl"
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trouble", [400, "null"])
def test_refused_prompts_end_the_run_unless_some_are_allowed(
    server: Server, tmp_path: Path, trouble: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers under way when it ends are kept, and no answer without text is ever written."""
    output = tmp_path / "answers.jsonl"
    server.trouble = {2: trouble}
    with pytest.raises(
        ValueError, match=r"endpoint.url .*prompt \d: .*again, with endpoint.refusals above 0"
    ):
        regenerate_by(endpoint(server), PROMPTS, output)
    first = len(server.asked)
    assert 3 <= first < 6 and not output.exists()
    server.trouble = {first + 1: trouble}
    rows = list(read_jsonl(regenerate_by(endpoint(server, refusals=1), PROMPTS, output)))
    assert len(server.asked) == first + 6 - (first - 1)
    assert len(rows) == 5 and all(row["response"] == row["prompt"].upper() for row in rows)
    assert "left out: prompt" in caplog.text


def test_a_server_is_told_to_apply_no_generation_config(server: Server, tmp_path: Path) -> None:
    """What vLLM and SGLang take from there otherwise; some servers refuse what they do not know."""
    regenerate_by(endpoint(server), PROMPTS[:1], tmp_path / "a.jsonl")
    body = {"repetition_penalty": 1.0, "min_p": 0.0, "top_k": -1, "top_p": 1.0, "temperature": 0.0}
    assert {key: server.asked[0].get(key) for key in body} == body
    server.unknown = ("min_p", "top_k")
    words = r"400 .*unrecognised: min_p.*: set endpoint.neutral to false"
    with pytest.raises(ValueError, match=words):
        regenerate_by(endpoint(server, refusals=100), PROMPTS, tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()
    output = regenerate_by(endpoint(server, neutral=False), PROMPTS, tmp_path / "b.jsonl")
    rows = list(read_jsonl(output))
    assert len(rows) == 6 and not set(server.asked[-1]) & {"repetition_penalty", "min_p", "top_k"}


def test_a_server_is_told_the_chat_templates_arguments(server: Server, tmp_path: Path) -> None:
    regenerate_by(endpoint(server), PROMPTS[:1], tmp_path / "a.jsonl")
    assert "chat_template_kwargs" not in server.asked[0]
    silent = endpoint(server, chat_template={"enable_thinking": False}, concurrency=1)
    server.trouble = {len(server.asked) + 2: 400}
    with pytest.raises(ValueError, match="run the same command again"):
        regenerate_by(silent, PROMPTS[:3], tmp_path / "b.jsonl")
    assert server.asked[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(
        ValueError, match="was begun with chat_template {'enable_thinking': False}, not None"
    ):
        regenerate_by(endpoint(server), PROMPTS[:3], tmp_path / "b.jsonl")


def test_a_second_run_of_one_output_is_refused(server: Server, tmp_path: Path) -> None:
    """It would write its answers, of other settings, into the first one's journal."""
    output, refused = tmp_path / "a.jsonl", []

    def second() -> str:
        with pytest.raises(ValueError, match=r"a.jsonl'.*another run is making it") as caught:
            regenerate_by(endpoint(server), PROMPTS, output, Generation(max_new_tokens=3))
        return str(caught.value)

    server.meanwhile = lambda count: refused.append(second()) if count == 2 else None
    regenerate_by(endpoint(server, concurrency=1), PROMPTS, output)
    assert len(refused) == 1 and len(server.asked) == len(PROMPTS)
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupted_run_asks_only_for_the_rest(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    server.trouble = {5: 400}
    with pytest.raises(ValueError, match="endpoint.url .*: 400 .*run the same command again"):
        regenerate_by(endpoint(server, concurrency=1), PROMPTS, output)
    assert not output.exists()
    server.asked.clear()
    server.trouble = {}
    regenerate_by(endpoint(server, concurrency=1), PROMPTS, output)
    assert len(server.asked) == 2 and len(output.read_text().splitlines()) == 6
    other = tmp_path / "other.jsonl"
    server.trouble = {4: 400, 5: 400}
    with pytest.raises(ValueError, match="400"):
        regenerate_by(endpoint(server, concurrency=1), PROMPTS, other)
    with pytest.raises(ValueError, match="was begun with top_p 1.0, not 0.5"):
        regenerate_by(endpoint(server), PROMPTS, other, Generation(top_p=0.5))


def raw(message: Any, **changes: Any) -> bytes:
    return json.dumps(
        {"choices": [{"message": message, "finish_reason": "stop"}], **changes}
    ).encode()


def test_a_chats_questions_are_asked_behind_the_new_answers(server: Server, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "old"},
    ]
    rows = placed([{"messages": chat}, {"prompt": "three"}, {"text": "no shape"}])
    server.raw[1] = raw(
        {"role": "assistant", "content": "ONE", "reasoning_content": "hm", "tool_calls": []}
    )
    tally = Tally("prompt")
    output = regenerate_by(endpoint(server, concurrency=1), rows, tmp_path / "a.jsonl", tally=tally)
    sent = [chat[0], {"role": "assistant", "content": "ONE"}, chat[2]]
    assert [body["messages"] for body in server.asked] == [
        chat[:1],
        [{"role": "user", "content": "three"}],
        sent,
    ]
    first, second = load_conversations(str(output))
    assert first.messages == [
        chat[0],
        {**sent[1], "reasoning_content": "hm"},
        chat[2],
        {"role": "assistant", "content": "TWO"},
    ]
    assert second.messages[-1]["content"] == "THREE" and list(tally.skipped.values()) == [1]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_beside_an_answer_is_kept(key: str, server: Server, tmp_path: Path) -> None:
    server.raw[1] = raw({"role": "assistant", "content": "4", key: "two and two"})
    output = regenerate_by(endpoint(server), PROMPTS[:1], tmp_path / "a.jsonl")
    assert next(load_conversations(str(output))).messages[1] == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "two and two",
    }
    server.raw[2] = raw({"role": "assistant", "content": None, key: "two and"})
    with pytest.raises(ValueError, match="all of max_new_tokens went into reasoning: raise it"):
        regenerate_by(endpoint(server), PROMPTS[:1], tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "content",
    [
        raw({"role": "user", "content": "x"}),
        raw("x"),
        raw(None),
        b'{"choices": {"message": 1}}',
        b'{"choices": []}',
        b"[]",
        b"null",
        b"3",
        b"no json",
        b"",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"choices": [[{"message": 1}]]}',
    ],
)
def test_answers_of_other_kinds_are_asked_for_again_and_named(
    content: bytes, server: Server, tmp_path: Path
) -> None:
    server.raw = {1: content}
    output = regenerate_by(endpoint(server), PROMPTS[:1], tmp_path / "a.jsonl")
    assert [row["response"] for row in read_jsonl(output)] == ["NUMBER 0"]
    server.raw = dict.fromkeys(range(1, 9), content)
    with pytest.raises(
        ValueError, match="endpoint.url http.*run the same command again when"
    ) as caught:
        regenerate_by(endpoint(server, retries=1), PROMPTS[1:2], tmp_path / "b.jsonl")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.journal"))


def test_an_answer_is_read_up_to_a_limit_and_half_pairs_are_replaced(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.endpoint.LONGEST_LINE", 1 << 20)
    server.raw = {1: raw({"content": "x" * (2 << 20)}), 2: raw({"content": "cut \ud83d"})}
    tally = Tally("prompt")
    output = regenerate_by(
        endpoint(server, concurrency=1, refusals=1), PROMPTS[:2], tmp_path / "a.jsonl", tally=tally
    )
    assert [row["response"] for row in read_jsonl(output)] == ["cut \ufffd"]
    assert tally.as_dict() == {"refused by the server": {"count": 1, "first": "prompts row 1"}}


def test_the_command_and_its_mistakes(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row.content) + "\n" for row in PROMPTS))
    flags = [
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "a.jsonl"),
        "--endpoint.model",
        "tiny",
    ]
    assert command([*flags, "--endpoint.url", server.url, "--limit", "2"]) == 0
    assert "2 answers" in capsys.readouterr().out
    for changes, words in (
        (["--endpoint.url", "localhost"], "endpoint.url must begin with http"),
        (["--endpoint.url", server.url, "--endpoint.concurrency", "0"], "endpoint.concurrency"),
        (["--endpoint.url", server.url], "exists already"),
    ):
        assert one_line_run(command, [*flags, *changes]) == 2
        assert words in capsys.readouterr().err


def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = Endpoint("http://127.0.0.1:9/v1", "tiny", retries=1, wait=0.001)
    with pytest.raises(
        ValueError, match="endpoint.url http://127.0.0.1:9/v1: .*connection.*failed"
    ):
        regenerate_by(gone, PROMPTS, tmp_path / "answers.jsonl")


class Elsewhere(BaseHTTPRequestHandler):
    """Sends every request on to another server, drips, or repeats the key."""

    def do_POST(self) -> None:
        server: Any = self.server
        self.rfile.read(int(self.headers["Content-Length"]))
        if server.mood == "redirect":
            self.send_response(server.status)
            self.send_header("Location", server.other)
            self.end_headers()
        elif server.mood == "drips the head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not server.stopped.wait(0.02):
                self.wfile.write(b"x")
        elif server.mood == "drips an error":
            self.send_response(404)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not server.stopped.wait(0.02):
                self.wfile.write(b"y")
        elif server.mood == "escapes":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"no\r\n\x1b[2Jgone")
        elif server.mood == "echo":
            content = f"no: {self.headers['Authorization']}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not server.stopped.wait(0.02):
                self.wfile.write(b" ")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    made.stopped, made.mood, made.status, made.other = threading.Event(), "redirect", 302, ""
    made.url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    serving(made)
    yield made
    made.stopped.set()
    made.shutdown()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_goes_nowhere(
    status: int, server: Server, elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRETKEY1234567890")
    elsewhere.status, elsewhere.other = status, f"{server.url}/chat/completions"
    with pytest.raises(ValueError, match=rf"redirects \({status}\)") as caught:
        regenerate_by(
            Endpoint(elsewhere.url, "m", retries=2, wait=0), PROMPTS, tmp_path / "o.jsonl"
        )
    assert (
        server.asked == [] and "\n" not in str(caught.value) and not (tmp_path / "o.jsonl").exists()
    )


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ("drip", "no whole answer within 0.3 seconds"),
        ("drips the head", "no whole answer within 0.3 seconds"),
        ("drips an error", "no whole answer within 0.3 seconds"),
    ],
)
def test_a_server_that_drips_is_given_up(
    mood: str, words: str, elsewhere: Any, tmp_path: Path
) -> None:
    """Whatever part of the answer it is, the whole takes no longer than the timeout."""
    elsewhere.mood, begun = mood, time.monotonic()
    with pytest.raises(ValueError, match=words):
        regenerate_by(
            Endpoint(elsewhere.url, "m", retries=0, timeout=0.3), PROMPTS, tmp_path / "o.jsonl"
        )
    assert time.monotonic() - begun < 5


def test_what_a_terminal_would_obey_is_not_repeated(elsewhere: Any, tmp_path: Path) -> None:
    elsewhere.mood = "escapes"
    with pytest.raises(ValueError, match="404 no \ufffd") as caught:
        regenerate_by(Endpoint(elsewhere.url, "m", retries=0), PROMPTS, tmp_path / "o.jsonl")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["sk-one\nline-of-two", "cl\u00e9-of-somebody"])
def test_a_key_that_no_header_takes_is_refused_without_repeating_it(
    key: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY holds") as caught:
        regenerate_by(endpoint(server, retries=0), PROMPTS, tmp_path / "o.jsonl")
    assert "of-" not in str(caught.value) and server.asked == []
    monkeypatch.setenv("OPENAI_API_KEY", " sk-good-key-12345\n")
    regenerate_by(endpoint(server, retries=0), PROMPTS, tmp_path / "o.jsonl")


def test_what_a_server_says_of_trouble_is_told_without_the_key(
    elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "unusual-key-of-somebody")
    elsewhere.mood = "echo"
    with pytest.raises(ValueError, match="401 no: Bearer <redacted>") as caught:
        regenerate_by(Endpoint(elsewhere.url, "m", retries=0), PROMPTS, tmp_path / "o.jsonl")
    assert "unusual-key" not in str(caught.value)


def test_credentials_in_the_address_are_refused_without_repeating_them() -> None:
    for address in ("http://h\r\nX: y/v1", "http://a b/v1", "http://h\udcff/v1"):
        with pytest.raises(ValueError, match="holds a space or a control character") as caught:
            Endpoint(address, "m")
        assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="holds credentials.*OPENAI_API_KEY") as caught:
        Endpoint("http://user:pa55word@127.0.0.1:1/v1", "m")
    assert "pa55word" not in str(caught.value)


def test_another_address_of_the_same_model_goes_on(server: Server, tmp_path: Path) -> None:
    server.trouble = {4: 400}
    with pytest.raises(ValueError):
        regenerate_by(
            Endpoint(server.url, "m", concurrency=1, retries=0), PROMPTS, tmp_path / "o.jsonl"
        )
    assert server.url not in (tmp_path / "o.jsonl.journal").read_text()
    moved = Server()
    serving(moved)
    with pytest.raises(ValueError, match="target"):
        regenerate_by(Endpoint(moved.url, "other", retries=0), PROMPTS, tmp_path / "o.jsonl")
    regenerate_by(Endpoint(moved.url, "m", retries=0), PROMPTS, tmp_path / "o.jsonl")
    moved.shutdown()
    assert len(moved.asked) == len(PROMPTS) - 3

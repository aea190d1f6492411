"""Figures of a load test by hand: timings, counters of servers, arrivals, rows of the report."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from eval.report.html import page
from eval.report.load_curves import curves, load_table
from eval.report.markdown import markdown
from eval.serving.benchmark import questions_of, report_of
from eval.serving.client import Question, Timing, _note
from eval.serving.load import Run, arrivals, run_load
from eval.serving.measurement import Point, drafts_of, row_of
from eval.serving.server_metrics import acceptance, page_of, read_counts
from eval.serving.settings import Load, Serving, check_server
from eval.tasks.tasks import Prompt
from modules.contracts.sampling import Sampling

VLLM = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a b"} 10.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a b"} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a b"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a b"} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a b",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a b",position="1"} 4.0
vllm:num_requests_running{engine="0"} 3.0
"""
SGLANG = """\
sglang:spec_accept_length{model_name="x",tp_rank="0"} 2.5
sglang:gen_throughput{model_name="x"} 100.0
"""


def timing(prompt: str, sent: float, pieces: list[float], tokens: int, **more: Any) -> Timing:
    question = Question(prompt, "even" if int(prompt[-1]) % 2 == 0 else "odd", "?", 0)
    ended = pieces[-1] if pieces else sent
    return Timing(question, sent, ended, pieces, f"text of {prompt}", tokens, True, **more)


def point(name: str, scale: float, load: int = 4) -> Point:
    """Four answers of five tokens: the first after a second, later ones every `scale` seconds."""
    whole = [
        timing(f"q{i}", float(i), [i + 1.0 + scale * k for k in range(5)], 5) for i in range(4)
    ]
    failed = Timing(Question("q9", "odd", "?", 0), 0.0, trouble="500")
    return Point(name, Load(load), Run([*whole, failed], 10.0), None)


def test_a_row_by_hand() -> None:
    plain, drafting = point("autoregressive", 0.4), point("served", 0.1)
    row = row_of(drafting, plain, "m", Sampling())
    assert row["name"] == "served, 4 at once" and row["prompts"] == 4 and row["lossless"] is None
    assert row["speedup"]["micro"] == pytest.approx(4.0)
    assert row["speedup"]["ci95"] == pytest.approx([4.0, 4.0])
    assert row["tokens_per_second"] == pytest.approx(10.0)
    assert row["by_task"]["even"]["speedup"] == pytest.approx(4.0)
    serving = row["serving"]
    assert serving["tokens_per_second"] == pytest.approx(2.0)
    assert (serving["requests"], serving["failed"]) == (5, 1)
    assert serving["time_to_first_token"]["p50"] == pytest.approx(1.0)
    assert serving["inter_token_latency"]["p99"] == pytest.approx(0.1)
    assert serving["request_seconds"]["mean"] == pytest.approx(1.4)
    assert (serving["same_text"], serving["compared"]) == (4, 4)
    alone = row_of(drafting, None, "m", Sampling())
    assert alone["speedup"]["micro"] is None and alone["serving"]["same_text"] is None


def test_pieces_of_several_tokens_do_not_shorten_a_token() -> None:
    """Nine tokens in three pieces: eight of them came in the two seconds after the first."""
    run = Run([timing("q0", 0.0, [1.0, 2.0, 3.0], 9)], 3.0)
    serving = row_of(Point("served", Load(1), run, None), None, "m", Sampling())["serving"]
    assert serving["inter_token_latency"]["p50"] == pytest.approx(0.25)
    assert serving["inter_piece_latency"]["p50"] == pytest.approx(1.0)


def test_counters_of_vllm() -> None:
    before = read_counts(VLLM)
    after = read_counts(VLLM.replace(" 10.0", " 20.0").replace(" 12.0", " 32.0")
                        .replace(" 8.0", " 17.0").replace(" 4.0", " 14.0"))  # fmt: skip
    figures = acceptance(before, after)
    assert figures is not None
    assert figures["tokens_per_call"] == pytest.approx(3.0) and figures["accepted"] == 20
    assert figures["by_depth"] == pytest.approx([0.9, 1.0])
    assert acceptance(before, before) is None, "no drafts in between"
    fresh = acceptance(None, before)
    assert fresh is not None and fresh["tokens_per_call"] == pytest.approx(2.2)


def test_other_servers() -> None:
    gauge = acceptance(None, read_counts(SGLANG))
    assert gauge is not None and gauge["tokens_per_call"] == 2.5 and gauge["source"] == "gauge"
    assert read_counts("llamacpp:prompt_tokens_total 7\nnot a line\n") is None
    assert acceptance(None, None) is None
    # llama.cpp tells drafts with each answer: 5 tokens, 3 of them drafts, are 2 calls.
    own = [timing("q0", 0.0, [1.0], 5, drafted=4, accepted=3), timing("q1", 0.0, [1.0], 1)]
    told = drafts_of(own)
    assert told is not None and told["tokens_per_call"] == pytest.approx(2.5)
    assert drafts_of([own[1]]) is None
    assert page_of("http://a:1/v1") == page_of("http://a:1/v1/") == "http://a:1/metrics"


class Chunk:
    """An event of a stream, as the client makes it."""

    def __init__(self, choices: list[Any], usage: Any = None, timings: Any = None) -> None:
        self.choices, self.usage, self.timings = choices, usage, timings


class Choice:
    def __init__(self, **delta: Any) -> None:
        self.delta = type("Delta", (), {"content": None, **delta})()


def test_events_of_a_stream() -> None:
    seen = Timing(Question("q0", "t", "?", 0), 0.0)
    usage = type("Usage", (), {"completion_tokens": 7})()
    for chunk in (
        Chunk([Choice(content="")]),
        Chunk([Choice(reasoning_content="hm ")]),
        Chunk([Choice(content="yes")]),
        Chunk([], usage, {"draft_n": 4, "draft_n_accepted": 3}),
    ):
        _note(seen, chunk)
    assert seen.text == "hm yes" and len(seen.pieces) == 2 and seen.tokens == 7
    assert (seen.drafted, seen.accepted) == (4, 3)


def test_a_call_of_a_function_is_an_answer() -> None:
    """Servers with a tool parser stream it apart from the text. The last event may be empty."""
    seen = Timing(Question("q0", "t", "?", 0), 0.0)
    spelled = ([("f", None)], [(None, '{"a":'), (None, "1}")], [])
    calls = [
        [SimpleNamespace(function=SimpleNamespace(name=a, arguments=b)) for a, b in some]
        for some in spelled
    ]
    for some in (*calls, [SimpleNamespace(function=None)]):
        _note(seen, Chunk([Choice(tool_calls=some)]))
    _note(seen, Chunk([SimpleNamespace(delta=None)]))
    assert seen.text == 'f{"a":1}' and len(seen.pieces) == 2


class Counting:
    """A server that counts the requests in flight."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def ask(self, question: Question) -> Timing:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        return Timing(question, 0.0, pieces=[0.0])


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_a_closed_loop_keeps_so_many_in_flight(concurrency: int) -> None:
    server: Any = Counting()
    questions = [Question(f"q{i}", "t", "?", i) for i in range(10)]
    run = asyncio.run(run_load(server, questions, Load(concurrency)))
    assert server.most == min(concurrency, 10)
    assert [each.question.seed for each in run.timings] == list(range(10))


def test_an_open_loop_does_not_wait_for_answers() -> None:
    server: Any = Counting()
    questions = [Question(f"q{i}", "t", "?", i) for i in range(40)]
    run = asyncio.run(run_load(server, questions, Load(rate=100_000.0)))
    assert server.most > 20 and [each.question.seed for each in run.timings] == list(range(40))


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(4001, 20.0, seed=3)
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert times[0] == 0.0 and sum(gaps) / 4000 == pytest.approx(0.05, rel=0.05)
    # The standard deviation of exponential gaps is their mean.
    assert sum(gap > 0.05 for gap in gaps) / 4000 == pytest.approx(0.368, abs=0.03)
    assert arrivals(5, 20.0, seed=3) == times[:5] != arrivals(5, 20.0, seed=4)


def test_questions_repeat_where_prompts_do_not_suffice() -> None:
    prompts = [Prompt(f"q{i}", "t", ("?",)) for i in range(3)]
    names = [q.prompt for q in questions_of(prompts, Serving(), Load(1), 0)]
    assert names == ["q0", "q1", "q2", "q0 again 1"]
    assert len(questions_of(prompts, Serving(), Load(16), 0)) == 64
    assert len(questions_of(prompts, Serving(requests=2), Load(16), 0)) == 2


def test_the_report_shows_loads_and_curves() -> None:
    rows = [
        row_of(point(name, scale, load), point("autoregressive", 0.4, load), "m",
               Sampling())
        for load in (1, 4)
        for name, scale in (("autoregressive", 0.4), ("served", 0.1))
    ]  # fmt: skip
    report = report_of(rows, "m", {"tasks": ["t"], "max_new_tokens": 5, "threads": 1})
    header, lines = load_table(rows)
    assert len(header) == len(lines[0]) and lines[1][:3] == ["served, 1 at once", "2.0", "1.00×"]
    assert set(curves(rows)) == {f"{name}, by requests in flight"
                                 for name in ("autoregressive", "served")}  # fmt: skip
    text, html = markdown(report), page(report, None)
    assert "## Load" in text and "4/4" in text and "m (served)" in text
    assert "Latency against throughput" in html and html.count("<svg") >= 4


@pytest.mark.parametrize(
    ("url", "settings", "words"),
    [
        (None, {}, "give its address, --url"),
        ("ftp://a/v1", {}, "must begin with http"),
        ("http://u:secret-word@a/v1", {}, "holds credentials"),
        ("http://a/v1", {"baseline_url": "b"}, "serving.baseline_url 'b' must begin"),
        ("http://a/v1", {"concurrency": []}, "are both empty"),
        ("http://a/v1", {"concurrency": [0]}, "must hold numbers above 0"),
        ("http://a/v1", {"request_rate": [2.0, 2.0]}, "each once"),
        ("http://a/v1", {"requests": 0}, "serving.requests must be at least 1"),
        ("http://a/v1", {"timeout": 0.0}, "serving.timeout above 0"),
    ],
)
def test_mistakes(url: str | None, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_server(url, Serving(**settings))


def test_a_request_has_its_prompts_system_prompt_tools_and_arguments() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    prompt = Prompt("q", "t", ("?",), system="brief", tools=[tool], template={"thinking": False})
    (question,) = questions_of([prompt], Serving(requests=1), Load(1), 0)
    assert question.messages == [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "?"},
    ]
    extra = {"top_k": -1, "chat_template_kwargs": {"thinking": True, "style": "short"}}
    sent = {"chat_template_kwargs": {"thinking": False, "style": "short"}, "tools": [tool]}
    assert question.fields(extra) == {"top_k": -1, **sent}
    (plain,) = questions_of([Prompt("q", "t", ("?",))], Serving(requests=1), Load(1), 0)
    assert plain.fields({"top_k": -1}) == {"top_k": -1} and len(plain.messages) == 1

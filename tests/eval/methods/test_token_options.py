"""Options of the command line that change which tokens are chosen, and schemas of prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from configs.command_line.loading import parse
from eval.cli import make_parser, read
from eval.evaluation import Evaluation, settings_of
from eval.methods.rows import Row
from eval.methods.token_options import TokenOptions
from eval.run.harness import Harness, units
from eval.tasks.answer_checks import matches_schema
from eval.tasks.tasks import load_tasks
from modules.contracts.sampling import Sampling
from tests.fakes import tiny_target

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def test_flags_and_settings_name_them() -> None:
    flags = [
        "--repetition_penalty=1.2",
        "--logit_bias={30: -4.0}",
        "--suppress_tokens=[7, 8]",
        '--stop_strings=["a b"]',
        "--min_new_tokens=3",
        "--top_k=4",
        "--temperature=[0, 1]",
    ]
    evaluation = read(parse(make_parser(), flags))
    cold, warm = evaluation.samplings
    assert warm == Sampling(
        1.0,
        4,
        repetition_penalty=1.2,
        logit_bias={30: -4.0},
        suppress_tokens=[7, 8],
        stop_strings=["a b"],
        min_new_tokens=3,
    )
    assert cold == replace(warm, temperature=0.0)
    settings = settings_of(evaluation)
    assert settings["logit_bias"] == {30: -4.0} and "presence_penalty" not in settings
    assert not TokenOptions().changed_options()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"constraint": "nowhere.json"}, "constraint 'nowhere.json' is no file"),
        ({"engine": "vllm", "min_p": 0.1}, "min_p is for this project's own loop"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Evaluation(**options).check()


def test_a_targets_settings_are_taken_when_asked_for() -> None:
    target = tiny_target()
    target.model.generation_config = GenerationConfig(repetition_penalty=1.3, eos_token_id=0)
    sampling = Sampling(suppress_tokens=[9])
    assert TokenOptions().on_target(sampling, target) == sampling
    taken = TokenOptions(generation_config=True).on_target(sampling, target)
    assert taken == replace(sampling, repetition_penalty=1.3)
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        TokenOptions().on_target(Sampling(logit_bias={900: 1.0}), target)


def task_file(folder: Path) -> Path:
    rows = [
        {"id": "a", "question": "How old?", "schema": SCHEMA},
        {"id": "b", "question": "How old?", "schema": json.dumps(SCHEMA)},
        {"id": "c", "question": "How old?"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "ages.yaml"
    task.write_text(
        f"source: {folder / 'rows.jsonl'}\nname: ages\nschema: schema\nreference: schema\n"
        "metric: json_schema\n"
    )
    return task


def test_rows_bring_a_schema_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness makes a constraint of each once, and hands over as many as prompts."""
    (task,) = load_tasks([str(task_file(tmp_path))])
    assert [json.loads(prompt.schema) for prompt in task.prompts] == [SCHEMA, SCHEMA]
    assert all(prompt.check is not None for prompt in task.prompts)
    made: list[str] = []
    monkeypatch.setattr("eval.run.harness.json_schema", lambda text, _: made.append(text) or text)
    seen: list[Any] = []

    class Decoder:
        name = "plain"

        def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Any]:
            seen.append(sampling.constraint)
            raise InterruptedError

    row = Row("plain", Decoder(), tiny_target(), Sampling(), "plain")
    harness = Harness([row], 4)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            list(harness.measure(units([task], 2, 1)[0]))
    assert seen == [[prompt.schema for prompt in task.prompts]] * 2
    assert sorted(made) == sorted({prompt.schema for prompt in task.prompts})


def test_a_constraint_beside_schemas_of_prompts_is_refused(tmp_path: Path) -> None:
    tasks = load_tasks([str(task_file(tmp_path))])
    with pytest.raises(ValueError, match="have JSON schemas of their own: leave it out"):
        TokenOptions(constraint="a.regex").applied_by("slipstream", tasks)
    assert TokenOptions().applied_by("slipstream", tasks) == tasks


def test_jsonschema_decides_whether_an_answer_is_valid() -> None:
    text = json.dumps(SCHEMA)
    assert matches_schema('{"age": 3}', text)
    assert not any(matches_schema(answer, text) for answer in ('{"age": "3"}', "{", "{}", "3"))

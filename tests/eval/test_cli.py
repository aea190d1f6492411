"""`python eval.py` end to end on a tiny target: reports, exit statuses, resuming, mistakes in one
line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import cli, evaluation
from eval.report import plots
from eval.report.summary import METHOD_KEYS
from modules.target.kernels import compiled_calls as compiled
from modules.target.target import Target
from tests.fakes import tiny_target
from tests.test_style import ROOT

FAKE = "tests.eval.fakes."


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every target is tiny, pictures are left out, and every path is relative to a scratch
    folder.
    """
    monkeypatch.setattr(evaluation, "load_target", lambda name, dtype, *_: target_of(dtype))
    monkeypatch.setattr(plots, "svg", lambda *_: "<svg></svg>")
    monkeypatch.chdir(tmp_path)


@cache
def target_of(dtype: str) -> Target:
    return tiny_target(dtype=getattr(torch, dtype))


def config(path: Path, decoders: Sequence[str | dict[str, Any]], **settings: Any) -> str:
    methods = [
        {"decoder": {"class_path": FAKE + name}} if isinstance(name, str) else name
        for name in decoders
    ]
    prompts = path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"id": i, "category": "ab"[i % 2], "turns": [f"question {i}", "and?"]})
            + "\n"
            for i in range(6)
        )
    )
    values = {
        "prompts": [str(prompts)],
        "max_new_tokens": 12,
        "methods": methods,
        "dtype": "float64",
        **settings,
    }
    (path / "config.yaml").write_text(json.dumps(values))
    return str(path / "config.yaml")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0)


def report(path: Path = Path("out")) -> dict[str, Any]:
    return json.loads((path / "report.json").read_text())


def methods(path: Path = Path("out")) -> dict[str, dict[str, Any]]:
    return {method["name"]: method for method in report(path)["methods"]}


def test_an_honest_evaluation(tmp_path: Path) -> None:
    assert (
        run(
            "--config",
            config(tmp_path, ["AlwaysRight", "NeverRight"]),
            "--output",
            "out",
            "--limit",
            "2",
        )
        == 0
    )
    found = report()
    assert (
        list(found) == ["schema", "environment", "targets", "settings", "methods"]
        and found["schema"] == 1
    )
    assert found["settings"]["tasks"] == ["a", "b"] and found["targets"][0]["dtype"] == "float64"
    assert all(tuple(method) == METHOD_KEYS for method in found["methods"])
    rows = methods()
    assert list(rows) == ["autoregressive", "alwaysright", "neverright"]
    assert all(
        row["lossless"] and row["identical_outputs"] == row["prompts"] == 4 for row in rows.values()
    )
    assert (
        rows["autoregressive"]["mean_accepted_tokens"] == 1.0
        and rows["autoregressive"]["speedup"]["micro"] == 1.0
    )
    assert (
        "noise" in rows["autoregressive"]["quality"]
        and rows["autoregressive"]["acceptance_by_depth"] == []
    )
    right, never = rows["alwaysright"], rows["neverright"]
    assert (
        right["mean_accepted_tokens"] == 4.0
        and right["conditional_acceptance_by_depth"] == [1.0] * 3
    )
    assert never["mean_accepted_tokens"] == 1.0 and never["conditional_acceptance_by_depth"] == [
        0.0
    ]
    assert right["accepted_length_histogram"][3] > 0 == sum(right["accepted_length_histogram"][:3])
    assert right["seconds_by_phase"]["prefill"] == pytest.approx(4 * 0.5)
    assert right["seconds"] == pytest.approx(right["seconds_by_phase"]["draft"] * 5)
    assert right["quality"]["drafted_nodes_per_call"] == 3
    assert "draft_seconds_per_node" not in rows["autoregressive"]["quality"]
    assert right["quality"]["draft_seconds_per_node"] == pytest.approx(0.02 / 3)
    assert set(right["by_task"]) == {"a", "b"} and right["by_task"]["a"]["prompts"] == 2
    for name in ("report.md", "report.html"):
        text = (Path("out") / name).read_text()
        assert "drafted tokens a call" in text and "6.67" in text
        assert (
            "alwaysright" in text
            and "question 0" not in text
            and "src=" not in text
            and 'href="http' not in text
        )


@pytest.mark.parametrize("fake", ["Liar", "Truncator"])
def test_a_lying_decoder_fails_the_evaluation(
    tmp_path: Path, fake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config(tmp_path, [fake]), "--output", "out", "--limit", "1") == 1
    row = methods()[fake.lower()]
    assert row["lossless"] is False and row["identical_outputs"] == 0
    assert row["first_divergence"]["position"] is not None
    assert (
        "promises the autoregressive row's tokens and gave others"
        in capsys.readouterr().out.replace("\n", " ")
    )
    assert "gave others" in (Path("out") / "report.html").read_text()


def test_a_lossy_method_that_says_so_does_not(tmp_path: Path) -> None:
    assert (
        run("--config", config(tmp_path, ["HonestlyLossy"]), "--output", "out", "--limit", "1") == 0
    )
    assert methods()["honestlylossy"]["lossless"] is False


def test_sampled_rows_are_not_called_lossless_and_share_seeds(tmp_path: Path) -> None:
    arguments = [
        "--config",
        config(tmp_path, ["AlwaysRight"]),
        "--temperature",
        "1",
        "--output",
        "out",
        "--limit",
        "2",
    ]
    assert run(*arguments) == 0
    rows = methods()
    assert {row["lossless"] for row in rows.values()} == {None} and rows["alwaysright"][
        "identical_outputs"
    ] is None
    assert rows["alwaysright"]["new_tokens"] == rows["autoregressive"]["new_tokens"]


def test_a_method_with_its_own_temperature_gets_its_own_baseline(tmp_path: Path) -> None:
    warm = {"name": "warm", "decoder": {"class_path": FAKE + "AlwaysRight"}, "temperature": 0.7}
    assert (
        run("--config", config(tmp_path, ["AlwaysRight", warm]), "--output", "out", "--limit", "1")
        == 0
    )
    assert list(methods()) == ["autoregressive", "alwaysright", "autoregressive at 0.7", "warm"]


def test_hugging_face_rows_and_a_training_free_drafter(tmp_path: Path) -> None:
    rows: list[Any] = [
        {
            "name": "hf_generate",
            "decoder": {"class_path": "eval.methods.huggingface.HuggingFaceGenerate"},
        },
        {
            "name": "scripted",
            "drafter": {"class_path": "tests.fakes.ScriptedDrafter", "init_args": {"depth": 2}},
        },
    ]
    assert run("--config", config(tmp_path, rows), "--output", "out", "--limit", "1") == 0
    scripted = methods()["scripted"]
    assert (
        scripted["mean_accepted_tokens"] > 2
        and scripted["lossless"]
        and scripted["builder"] == "own"
    )
    assert (
        methods()["hf_generate"]["engine"] == "transformers"
        and methods()["hf_generate"]["lossless"]
    )
    assert methods()["hf_generate"]["mean_accepted_tokens"] is None


def test_compiled_calls_are_asked_for_by_name_and_told_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target()
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(evaluation, "load_target", lambda *_: target)
    rows: list[Any] = [
        {"name": "scripted", "drafter": {"class_path": "tests.fakes.ScriptedDrafter"}}
    ]
    arguments = ["--config", config(tmp_path, rows), "--output", "out", "--limit", "1", "--compile"]
    assert run(*arguments, "true") == 0
    assert report()["settings"]["compile"] is True and all(
        row["lossless"] for row in report()["methods"]
    )
    assert target.compiled is not None and sorted(
        {width for width, *_ in target.compiled.graphs}
    ) == [1, 4]
    assert run(*arguments, "fast") == 2


def test_later_turns_batches_and_repeats(tmp_path: Path) -> None:
    path = config(tmp_path, ["AlwaysRight"], turns="all", batch_size=2, repeats=2)
    assert run("--config", path, "--output", "out") == 0
    rows = methods()
    assert rows["alwaysright"]["prompts"] == 12 and rows["alwaysright"]["lossless"]
    batches, turns = 4, 2  # of each task's three prompts, two are decoded together
    assert rows["alwaysright"]["seconds_by_phase"]["prefill"] == pytest.approx(
        batches * turns * 0.5
    )


def test_embedded_prompts_may_be_shown(tmp_path: Path) -> None:
    path = config(tmp_path, ["AlwaysRight"])
    assert run("--config", path, "--prompts", "embedded", "--output", "out", "--limit", "1") == 0
    assert "<mark>" in (Path("out") / "report.html").read_text()


def test_an_evaluation_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = config(tmp_path, ["AlwaysRight"])
    assert run("--config", path, "--output", "out") == 0
    journal, full = Path("out/journal.jsonl"), report()
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    journal.write_text("".join(lines[:4]) + lines[4][:50])
    assert run("--config", path, "--output", "out", "--resume") == 0
    assert (
        journal.read_text().splitlines(keepends=True)[:4] == lines[:4]
        and len(journal.read_text().splitlines()) == 7
    )
    assert [m["new_tokens"] for m in report()["methods"]] == [
        m["new_tokens"] for m in full["methods"]
    ]


def test_a_journal_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, ["AlwaysRight"])
    assert run("--config", path, "--output", "out", "--limit", "1") == 0
    assert run("--config", path, "--output", "out", "--max_new_tokens", "5", "--resume") == 2
    assert "another max_new_tokens (12, now 5)" in capsys.readouterr().err
    assert run("--config", path, "--output", "out", "--max_new_tokens", "5", "--overwrite") == 0
    assert Path("out/journal.previous.jsonl").exists()


def test_two_reports_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert (
            run("--config", config(tmp_path, ["AlwaysRight"]), "--output", name, "--limit", "2")
            == 0
        )
    assert run("--compare", "one/report.json", "two") == 0
    assert "alwaysright" in capsys.readouterr().out
    assert run("--compare", "one/report.json", "three.json") == 2
    assert "'three.json' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limt": 3}, "limt"),
        ({"limit": "abc"}, "limit"),
        ({"limit": 0}, "limit 0"),
        ({"turns": "some"}, "turns"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"prompts": ["no.jsonl"]}, "prompts 'no.jsonl' does not exist"),
        ({"drafters": ["eval"]}, "eval"),
        ({"temperature": -1.0}, "temperature"),
        ({"methods": [{"name": "x"}]}, "give either `drafter` or `decoder`"),
        ({"methods": [{"name": "x", "drafter": "runs/a/b/c"}]}, "'runs/a/b/c' does not exist"),
        (
            {"methods": [{"name": "x", "drafter": {"class_path": "modules.nothing.Here"}}]},
            "cannot be found",
        ),
        (
            {
                "methods": [
                    {
                        "drafter": {
                            "class_path": "tests.fakes.ScriptedDrafter",
                            "init_args": {"dep": 1},
                        }
                    }
                ]
            },
            "dep",
        ),
        ({"methods": [{"name": "x", "drafter": "a/b", "rule": "greddy"}]}, "greddy"),
        ({"methods": [{"name": "x", "drafter": "a/b", "budget": 0}]}, "budget 0"),
        (
            {"methods": [{"name": "x", "drafter": "a/b"}, {"name": "x", "drafter": "a/c"}]},
            "'x' is taken twice",
        ),
        (
            {"methods": [{"name": "autoregressive", "drafter": "a/b"}]},
            "'autoregressive' is taken twice",
        ),
        ({"methods": [{"name": "x", "budgt": 3}]}, "budgt"),
    ],
)
def test_mistakes_are_one_line_before_anything_loads(
    tmp_path: Path,
    settings: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation, "load_target", lambda *_: pytest.fail("the target was loaded"))
    (tmp_path / "eval").mkdir()
    assert run("--config", config(tmp_path, ["AlwaysRight"], **settings)) == 2
    error = capsys.readouterr().err
    print(error)
    assert error.count("\n") == 1 and words in error


def test_prompts_that_fit_no_context_are_named_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, ["AlwaysRight"])
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(
            json.dumps({"id": 9, "category": "a", "turns": ["x" * 600]}) + '\n{"turns": 3}\n'
        )
    assert run("--config", path, "--output", "out") == 0
    told = capsys.readouterr().out
    assert report()["settings"]["skipped"] == ["a/9"] and "a/9" in told
    ((reason, left_out),) = report()["settings"]["left_out"].items()
    assert (
        reason == "`turns` is a number, expected text or turns"
        and f"skipped 1 prompt: {reason}" in told
    )
    assert left_out["count"] == 1 and left_out["first"].startswith("prompts.jsonl line ")
    assert run("--config", path, "--output", "out", "--max_new_tokens", "600", "--overwrite") == 2
    assert "no prompt fits" in capsys.readouterr().err


def test_a_stored_report_renders_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        run("--config", config(tmp_path, ["AlwaysRight"]), "--output", "out", "--limit", "1") == 0
    )
    page = Path("out") / "report.html"
    written = page.read_text()
    page.unlink()
    assert run("--render", "out/report.json") == 0
    assert page.read_text() == written
    page.unlink()
    assert run("--render", "out") == 0 and page.read_text() == written


def test_only_a_report_renders(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--render", "nowhere.json") == 2
    assert "'nowhere.json' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["spec_bench_greedy_epyc2_202611", "judge_xeon2_202611", "spec_bench_sampled_epyc2_202611"],
)
def test_reports_of_the_docs_still_render(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "benchmarks" / name / "report.json", tmp_path)
    assert run("--render", str(tmp_path)) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") >= 2 and "autoregressive" in text


@pytest.mark.parametrize("key", ["methods", "top_k", "repeats", "seed", "temperature"])
def test_null_is_refused_where_a_key_does_not_take_it(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"{key}: null\n")
    assert run("--config", str(tmp_path / "c.yaml"), "--output", "out") == 2
    assert f"{key} must not be null" in capsys.readouterr().err
    assert not Path("out").exists()

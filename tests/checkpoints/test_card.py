"""Model cards: their figures are the report's, their metadata is whole, and they render."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from checkpoints.card import hub_name
from checkpoints.formats.known import FORMATS
from checkpoints.hub import publication
from checkpoints.pretrained import Provenance, save_pretrained
from modules.contracts.trainable import Trainable
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.target.target import Target
from tests.checkpoints.hub_server import card_errors
from tests.fakes import tiny_target


def card_of(run: Path, **options) -> str:
    return bytes(publication(run, "ada/heads", **options).files["README.md"]).decode()


def rows(card: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = card.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# -- figures ---------------------------------------------------------------------------------------


def test_the_table_and_the_metadata_hold_the_reports_figures(evaluated) -> None:
    file = evaluated / "eval" / "report.json"
    report = {row["name"]: row for row in json.loads(file.read_text())["methods"]}
    card = card_of(evaluated, report=file)
    shown = rows(card, "Evaluation")
    assert [row[0] for row in shown] == [
        "autoregressive",
        "autoregressive at 1",
        "heads",
        "heads at 1",
    ]
    for name, speedup, interval, tau, rate, same in shown:
        row = report[name]
        assert (
            speedup == f"{row['speedup']['micro']:.2f}×"
            and tau == f"{row['mean_accepted_tokens']:.2f}"
        )
        low, high = row["speedup"]["ci95"]
        assert interval == f"{low:.2f}–{high:.2f}" and rate == f"{row['tokens_per_second']:.1f}"
        assert same == ("4 of 4" if row["temperature"] == 0 else "sampled: cannot be compared")
    results = ModelCard(card).data.eval_results
    assert results is not None and len(results) == 6
    for one in results:
        row = report[
            "heads" if one.dataset_config == "temperature 0, batch size 1" else "heads at 1"
        ]
        figure = row["speedup"]["micro"] if one.metric_type == "speedup" else row[one.metric_type]
        assert one.metric_value == figure and one.dataset_name == "questions"
    assert "lookup" not in card and "4 prompts (questions: a, b), up to 12 new tokens" in card


def test_data_that_were_not_given_are_not_listed(trained) -> None:
    file = trained / "drafter" / "provenance.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "data": {"train": "embedded", "validation": None}}))
    card = card_of(trained)
    assert "- train: embedded\n" in card and "validation" not in card and "None" not in card


def test_training_figures_stand_apart_and_serve_when_there_is_no_report(trained) -> None:
    card = card_of(trained)
    assert "## Evaluation" not in card
    assert ["probe/tau", "1.2500"] in [row[:2] for row in rows(card, "Measured while training")]
    results = ModelCard(card).data.eval_results or []
    assert [(one.metric_type, one.metric_value) for one in results] == [
        ("mean_accepted_tokens", 1.25)
    ]


def changed(file: Path, row: str, **figures) -> Path:
    report = json.loads(file.read_text())
    report["methods"] = [
        {**one, **figures} if one["name"] == row else one for one in report["methods"]
    ]
    file.write_text(json.dumps(report))
    return file


def test_missing_intervals_ties_and_lossy_rules_are_said(evaluated) -> None:
    file = changed(
        evaluated / "eval" / "report.json",
        "heads",
        claims_lossless=False,
        identical_outputs=3,
        tie_divergences=1,
        speedup={"micro": None, "macro": None, "ci95": None},
        mean_accepted_tokens=None,
    )
    card = card_of(evaluated, report=file)
    row = next(row for row in rows(card, "Evaluation") if row[0] == "heads")
    assert row[1:4] == ["–", "–", "–"] and row[5] == "3 of 4, 1 at ties (a lossy rule)"
    results = ModelCard(card).data.eval_results
    assert results is not None and len(results) == 4


def test_rows_by_another_name_are_found_by_size_or_named(evaluated) -> None:
    file = changed(evaluated / "eval" / "report.json", "heads", name="mine")
    changed(file, "heads at 1", name="mine at 1")
    assert [row[0] for row in rows(card_of(evaluated, report=file), "Evaluation")][2:] == [
        "mine",
        "mine at 1",
    ]
    changed(file, "mine at 1", name="yours")
    with pytest.raises(
        ValueError, match="no row 'heads': give --row, one of autoregressive, mine, lookup.*, yours"
    ):
        card_of(evaluated, report=file)
    assert [row[0] for row in rows(card_of(evaluated, report=file, row="yours"), "Evaluation")][
        2:
    ] == ["yours"]


def test_reports_of_something_else_are_refused(evaluated, tmp_path) -> None:
    file = evaluated / "eval" / "report.json"
    text = file.read_text()
    with pytest.raises(
        ValueError, match="no row 'nobody': give --row, one of autoregressive, heads, "
    ):
        card_of(evaluated, report=file, row="nobody")
    changed(file, "heads", drafter_parameters=7)
    with pytest.raises(ValueError, match="row 'heads' has 7 parameters, this component"):
        card_of(evaluated, report=file)
    report = json.loads(text)
    for name in ("tiny-llama", "another"):
        report["targets"][0] |= {"name": name, "fingerprint": "0123"}
        file.write_text(json.dumps(report))
        words = (
            f"is about a {name} with weights 0123, this component was trained for tiny-llama with "
            "weights "
        )
        with pytest.raises(ValueError, match=words):
            card_of(evaluated, report=file)
    for wrong in ("{}", json.dumps({**json.loads(text), "schema": 2})):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="no whole report of schema 1"):
            card_of(evaluated, report=file)
    file.write_text(text)
    os.utime(file, (0, 0))
    with pytest.raises(ValueError, match="is older than the component .*: measure again"):
        card_of(evaluated, report=file)


def test_a_report_with_forged_values_is_refused_by_file_and_key(evaluated) -> None:
    file = changed(evaluated / "eval" / "report.json", "heads", speedup={"micro": "<b>9</b>"})
    words = r"report '.*report.json': methods\[2\].speedup.micro is text, expected a number"
    with pytest.raises(ValueError, match=words):
        card_of(evaluated, report=file)


@pytest.mark.parametrize(
    "place",
    [
        "settings.tasks",
        "settings.max_new_tokens",
        "settings.threads",
        "methods.0.identical_outputs",
        "methods.1.tie_divergences",
        "methods.1.drafter_parameters",
    ],
)
def test_a_report_without_what_a_card_shows_is_refused_by_key(evaluated, place: str) -> None:
    file = evaluated / "eval" / "report.json"
    forged = json.loads(file.read_text())
    *outer, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    inner = forged
    for key in outer:
        inner = inner[key]
    del inner[last]
    file.write_text(json.dumps(forged))
    with pytest.raises(ValueError, match=rf"report '.*report.json': .*{last} is missing"):
        card_of(evaluated, report=file)


def test_a_report_about_the_adapted_target_beside_the_plain_one_is_the_components_own(
    evaluated,
) -> None:
    """As of Medusa-2, whose rows run on weights of their own."""
    file = evaluated / "eval" / "report.json"
    report = json.loads(file.read_text())
    adapted = {**report["targets"][0], "fingerprint": "0123"}
    file.write_text(json.dumps({**report, "targets": [*report["targets"], adapted]}))
    assert len(rows(card_of(evaluated, report=file), "Evaluation")) == 4


# -- metadata --------------------------------------------------------------------------------------


def test_the_metadata_is_whole(evaluated) -> None:
    card = card_of(evaluated, report=evaluated / "eval" / "report.json")
    assert card_errors(card) == []
    data = ModelCard(card).data.to_dict()
    assert (
        data["license"] == "other"
        and data["library_name"] == "slipstream"
        and "base_model" not in data
    )
    assert {"slipstream", "speculative-decoding", "medusa"} <= set(data["tags"])
    assert data["model-index"][0]["name"] == "heads" and data["pipeline_tag"] == "text-generation"
    assert ModelCard(card_of(evaluated, license="mit")).data.license == "mit"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("ada/model", "ada/model"),
        ("/models/ada", None),
        ("./ada", None),
        ("a/b/c", None),
        ("tests/checkpoints", None),
        ("model.gguf", None),
        ("~/model", None),
    ],
)
def test_the_base_model_is_a_hub_id_or_absent(name, expected, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert hub_name(name) == expected


def test_the_embedded_target_brings_its_licence_and_id(trained) -> None:
    config, provenance = (trained / "drafter" / name for name in ("config.json", "provenance.json"))
    for file in (config, provenance):
        file.write_text(file.read_text().replace("tiny-llama", "smollm2-135m"))
    data = ModelCard(card_of(trained)).data
    assert (data.license, data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


# -- use and serve ---------------------------------------------------------------------------------


def published(folder: Path, drafter: Trainable, target: Target) -> str:
    save_pretrained(drafter, folder, Provenance.of(target))
    return card_of(folder)


def test_only_what_an_engine_serves_gets_commands_to_serve_it(tmp_path) -> None:
    target = tiny_target(layers=8)
    shape = target.shape
    for kind, served in (
        (Eagle3(shape), {"speculators": "vllm serve", "sglang": "sglang.launch_server"}),
        (Eagle(shape), {"eagle": "vllm serve", "eagle_sglang": "sglang.launch_server"}),
        (Medusa(shape), {"medusa": "vllm serve", "medusa_reference": "from_pretrained"}),
        (Clover(shape), {}),
    ):
        card = published(tmp_path / type(kind).__name__, kind, target)
        commands = re.findall(r"checkpoints.export --format (\w+) ada/heads exports/(\w+)", card)
        assert commands == [(form, form) for form in served]
        for form, started in served.items():
            lines = card.split(f"--format {form} ada/heads exports/{form}\n", 1)[1].splitlines()[0]
            assert (
                started in lines
                and f"exports/{form}" in lines
                and " and ".join(FORMATS[form].ENGINES) in card
            )
        assert ("No serving engine loads this" in card) == (not served)
        assert 'component = load_pretrained("ada/heads", target)' in card


class Page(HTMLParser):
    """Tags that are open at the end, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("br", "hr", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_card_renders(evaluated) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    text = ModelCard(card_of(evaluated, report=evaluated / "eval" / "report.json")).text
    page = Page()
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    page.feed(html)
    assert page.open == [] and page.seen.count("table") == 2 and page.seen.count("h1") == 1
    assert (
        html.count("<tr>") == 1 + 4 + 1 + 2
        and "|---" not in html
        and '<code class="language-python">' in html
    )


def test_places_that_a_report_names_are_not_in_the_card(evaluated) -> None:
    file = evaluated / "eval" / "report.json"
    report = json.loads(file.read_text())
    place = "/home/alice/secret"
    report["targets"][0]["name"] = f"{place}/llama"
    report["environment"]["device"] = f"{place}/cpu"
    report["settings"]["tasks"] = [f"{place}/tasks.jsonl"]
    file.write_text(json.dumps(report))
    card = card_of(evaluated, report=file)
    assert "alice" not in card and "llama in float64" in card and "tasks.jsonl" in card

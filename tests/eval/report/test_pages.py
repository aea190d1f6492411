"""Text pieces, the page, the pictures and the comparison of reports."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from eval.report import plots
from eval.report.compare import comparison_table
from eval.report.html import Sample, page, shaded
from eval.report.markdown import HALF, main_table, markdown, outside
from eval.report.summary import METHOD_KEYS
from eval.report.token_pieces import pieces
from tests.fakes import tiny_tokenizer


class Bytes:
    """A tokenizer of single bytes, as byte-level vocabularies have them; id 0 is special."""

    def decode(
        self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


def method(name: str, micro: float = 1.5, **other: Any) -> dict[str, Any]:
    entry = {"speedup": micro, "ci95": [micro - 0.1, micro + 0.1]}
    values: dict[str, Any] = {
        **dict.fromkeys(METHOD_KEYS),
        "name": name,
        "claims_lossless": True,
        "lossless": True,
        "temperature": 0.0,
        "prompts": 4,
        "identical_outputs": 3,
        "tie_divergences": 1,
        "new_tokens": 40,
        "tokens_per_second": 20.0,
        "time_to_first_token": 0.05,
        "speedup": {"micro": micro, "macro": micro, "ci95": [micro - 0.1, micro + 0.1]},
        "acceptance_by_depth": [0.8, 0.4],
        "conditional_acceptance_by_depth": [0.8, 0.5],
        "mean_accepted_tokens": 2.2,
        "seconds_by_phase": dict.fromkeys(
            ("prefill", "draft", "verify", "accept", "commit", "other"), 0.5
        ),
        "quality": {},
        "by_task": {"a": entry, "b & <c>": entry},
    }
    return {**values, **other}


def report(*methods: dict[str, Any]) -> dict[str, Any]:
    environment = {
        "device": "cpu",
        "system": "any",
        "packages": {},
        "command": "x <y>",
        "git_revision": None,
    }
    return {
        "schema": 1,
        "environment": environment,
        "targets": [
            {"name": "tiny", "parameters": 1_000_000, "dtype": "float32", "fingerprint": "f"}
        ],
        "settings": {"tasks": ["a", "b & <c>"], "max_new_tokens": 8, "threads": 1},
        "methods": list(methods),
    }


def test_pieces_wait_for_whole_characters_and_join_to_the_text() -> None:
    text = "naïve 🙂!"
    tokens = [(byte, index % 2 == 0) for index, byte in enumerate(text.encode())] + [(0, False)]
    found = list(pieces(tokens, Bytes()))
    assert "".join(piece for piece, _ in found) == text and "�" not in "".join(
        piece for piece, _ in found
    )
    assert [piece for piece, _ in found][2] == "ï"


def test_pieces_leave_special_tokens_out_and_show_what_stays_broken() -> None:
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer("hi", add_special_tokens=False)["input_ids"], 0]
    assert (
        "".join(p for p, _ in pieces([(i, False) for i in ids], tokenizer)).replace(" ", "") == "hi"
    )
    assert list(pieces([(0xF0, True)], Bytes())) == [("�", True)]


def test_neighbouring_drafts_share_a_mark_and_text_is_escaped() -> None:
    assert (
        shaded([("a", False), ("<", True), ("b", True), ("c", False), ("d", True)])
        == "a<mark>&lt;b</mark>c<mark>d</mark>"
    )


def test_pictures_are_svg_with_text_and_errors_bars_for_every_task() -> None:
    methods = [method("one"), method("two", 0.9)]
    for picture in (
        plots.speedup_by_task(methods),
        plots.acceptance_by_depth(methods),
        plots.time_per_phase(methods),
    ):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "b &amp; &lt;c&gt;" in plots.speedup_by_task(methods)


def test_dollars_in_names_are_text_in_pictures() -> None:
    """Not mathematics, which a name need not be: `$\\frac{1}{0$` ended an evaluation."""
    name = "$\\frac{1}{0$"
    one = method("m")
    strange = {**one, "name": name, "by_task": {name: next(iter(one["by_task"].values()))}}
    assert "frac" in plots.speedup_by_task([strange])


def test_variants_are_grouped_by_what_alone_differs() -> None:
    rows = [
        method("a", batch_size=1),
        method("a, 4 at once", batch_size=4),
        method("b", batch_size=1),
        method("a at 0.5", batch_size=1, temperature=0.5),
        method("a at 0.5, 4 at once", batch_size=4, temperature=0.5),
    ]
    by_batch, by_heat = plots.series(rows, "batch_size"), plots.series(rows, "temperature")
    assert {name: [row["batch_size"] for row in group] for name, group in by_batch.items()} == {
        "a": [1, 4],
        "a at 0.5": [1, 4],
    }
    assert list(by_heat) == ["a", "a, 4 at once"] and [
        row["temperature"] for row in by_heat["a"]
    ] == [0.0, 0.5]
    assert "temperature" in plots.speedup_against(rows, "temperature")


def test_accepted_lengths_are_shares_of_calls() -> None:
    rows = [
        method("a", accepted_length_histogram=[3, 1]),
        method("none", accepted_length_histogram=[4]),
    ]
    picture = plots.accepted_lengths(rows)
    assert (
        ElementTree.fromstring(picture).tag.endswith("svg")
        and ">a<" in picture
        and ">none<" not in picture
    )


def relaxed_rows() -> list[dict[str, Any]]:
    """A lossless row, and rules that are the worse the more they let through."""

    def row(name: str, rule: str, tau: float, difference: float) -> dict[str, Any]:
        paired = {
            "difference": difference,
            "ci95": [difference - 0.1, difference + 0.1],
            "verdict": "loss",
            "win": 0,
            "tie": 1,
            "loss": 4,
        }
        quality = {
            "target_log_likelihood": -1.0,
            "likelihood_against_plain": paired,
            "argmax_share": 0.9,
            "common_prefix": 0.5,
        }
        return method(
            name,
            rule=rule,
            builder="StaticTree",
            claims_lossless=False,
            lossless=False,
            quality=quality,
            mean_accepted_tokens=tau,
        )

    return [
        method("clover", builder="StaticTree"),
        row("judge_0", "judge 0", 4.0, -2.0),
        row("judge_0.9", "judge 0.9", 2.3, -0.1),
        row("top_2", "top_k 2", 2.6, -0.3),
    ]


def test_what_relaxing_costs_is_a_curve_for_every_kind_of_rule() -> None:
    rows = relaxed_rows()
    curves = plots.relaxed(rows)
    assert {name: [row["name"] for row in curve] for name, curve in curves.items()} == {
        "judge, StaticTree": ["judge_0.9", "judge_0"],
        "top_k, StaticTree": ["top_2"],
    }
    for key in plots.GAINS:
        picture = plots.trade_off(rows, key)
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert all(
            f">{name}<" in picture
            for name in ("clover", "judge_0", "judge_0.9", "top_2", "judge, StaticTree")
        )
    text = page(
        report(method("autoregressive", 1.0, builder="", acceptance_by_depth=[]), *rows), None
    )
    assert "What relaxing costs" in text and "-2.000 (-2.100 to -1.900): loss" in text
    assert "What relaxing costs" not in page(report(method("one")), None)


def test_the_page_is_self_contained_and_shows_a_failure() -> None:
    bad = method("liar", lossless=False)
    baseline = method(
        "autoregressive",
        1.0,
        quality={"noise": {"micro": 1.01, "ci95": None}},
        acceptance_by_depth=[],
    )
    text = page(
        report(baseline, method("one"), bad),
        Sample("one", "Why <so>?", [("Because", False), (" &", True)]),
    )
    for words in (
        "liar promises",
        "<tr class=bad>",
        "Why &lt;so&gt;?",
        "<mark> &amp;</mark>",
        "x &lt;y&gt;",
    ):
        assert words in text
    assert (
        "<script" not in text
        and "http-equiv" not in text
        and 'href="http' not in text.replace("xlink:", "")
    )
    assert text.count("<svg") == 3


def test_time_outside_of_forwards_is_told_where_phases_are_known() -> None:
    seconds = {
        "prefill": 9.0,
        "draft": 2.0,
        "verify": 7.0,
        "accept": 0.5,
        "commit": 0.3,
        "other": 0.2,
    }
    known = method("ours", seconds_by_phase=seconds)
    theirs = method("theirs", seconds_by_phase={**dict.fromkeys(seconds, 0.0), "other": 5.0})
    assert outside(known) == pytest.approx(0.1) and outside(theirs) is None
    text = markdown(report(known, theirs))
    assert (
        "| ours | 9.00 | 2.00 | 7.00 | 0.50 | 0.30 | 0.20 | 10.0% |" in text
        and "| 5.00 | – |" in text
    )


def test_the_less_repetitive_half_has_a_table_where_it_was_measured() -> None:
    half = {"prompts": 2, "speedup": 1.2, "ci95": [1.1, 1.3], "mean_accepted_tokens": 1.4}
    plain = method(
        "autoregressive",
        1.0,
        quality={"noise": {"micro": 1.0, "ci95": None}},
        less_repetitive_half=half,
    )
    found = report(plain, method("lookup", less_repetitive_half=half), method("older"))
    assert "| lookup | 1.20× | 1.10–1.30 | 1.40 | 2 |" in markdown(found)
    text = page(found, None)
    assert text.count(HALF) == 1 and text.count("<td>1.10–1.30</td>") == 1
    assert HALF not in markdown(report(method("older"))) and HALF not in page(
        report(method("older")), None
    )


def test_tasks_have_a_table_where_something_is_said_of_them() -> None:
    whole = report(method("one"))
    assert "## Tasks" not in markdown(whole)
    entry = {"prompts": 2, "language": "Thai", "thinking": "off", "metric": None}
    plain = {"prompts": 1, "language": None, "thinking": None, "metric": None}
    whole["settings"]["task_table"] = {"a": plain}
    assert "## Tasks" not in markdown(whole)
    whole["settings"]["task_table"] = {"a": entry, "b": plain}
    lines = markdown(whole).partition("## Tasks\n\n")[2].splitlines()[:4]
    assert lines == [
        "| task | prompts | language | thinking | scored by |",
        "| --- | --- | --- | --- | --- |",
        "| a | 2 | Thai | off | – |",
        "| b | 1 | – | – | – |",
    ]
    assert "task table" not in page(whole, None)


def test_markdown_has_every_method_and_task() -> None:
    text = markdown(
        report(
            method("one"),
            method("two", 0.8, lossless=None, temperature=1.0, acceptance_by_depth=[]),
            method("served", 1.1, lossless=None),
        )
    )
    for words in (
        "| one | 1.50× | 1.40–1.60 |",
        "| two | 0.80× |",
        "b &amp; &lt;c&gt;",
        "sampled",
        "not compared",
        "yes (3/4, 1 ties)",
    ):
        assert words in text


NAMES = ("autoregressive", "rasd_eagle3_bf16", "clover at 0.5, 16 at once", "hf_prompt_lookup")


@pytest.mark.parametrize("width", [60, 72, 80, 100, 160])
def test_figures_are_never_cut_however_narrow_the_terminal_is(width: int) -> None:
    methods = [
        method(name, 10.25, tie_divergences=2, prompts=480, identical_outputs=478) for name in NAMES
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(main_table(report(*methods), console.width))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("10.25×") == 4 and text.count(" 2.20 ") == 4 and " τ " in text
    assert ("20.0" in text, "10.15–10.35" in text) == (width >= 100, width >= 72)


@pytest.mark.parametrize(("width", "shown"), [(60, "sl"), (80, "slτ"), (120, "slτt")])
def test_a_comparison_leaves_out_columns_before_it_cuts_one(width: int, shown: str) -> None:
    methods = [method(name, 1.5, target="tiny", batch_size=1) for name in NAMES]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(report(*methods), report(*methods), console.width))
    text = console.export_text()
    assert "…" not in text and text.count("1.50× → 1.50×") == 4
    figures = {"s": "1.50× → 1.50×", "l": "yes → yes", "τ": "2.20 → 2.20", "t": "20.0 → 20.0"}
    assert [key for key, words in figures.items() if words in text] == list(shown)


def test_of_many_methods_the_fastest_are_drawn() -> None:
    many = [
        {"name": str(k), "speedup": {"micro": None if k == 3 else 1 + (k % 10) / 10}}
        for k in range(12)
    ]
    assert [method["name"] for method in plots.fastest(many)] == [
        "1",
        "2",
        "4",
        "5",
        "6",
        "7",
        "8",
        "9",
    ]
    assert plots.fastest(many[:8]) == many[:8]


def test_names_of_strangers_are_harmless_in_a_report() -> None:
    hostile = "x<script>alert(1)</script>\n\n# heading\n[a](http://b) | e"
    one = method("plain"), method(hostile, lossless=False)
    whole = report(*({**each, "by_task": {hostile: each["by_task"]["a"]}} for each in one))
    whole["environment"]["device"] = hostile
    whole["settings"]["tasks"] = [hostile]
    told = markdown(whole)
    assert (
        "<script" not in told
        and "\n# heading" not in told
        and "[a](" not in told.replace("\\[a\\](", "")
    )
    rows = [line for line in told.splitlines() if "alert(1)" in line and line.startswith("|")]
    assert rows and all(line.endswith("|") for line in rows)
    console = Console(file=io.StringIO(), width=200)
    for name in ("[/bold]", "[red]x[/red]", "[link=http://a]b[/link]", "[/x"):
        console.print(main_table(report(method("plain"), method(name)), 200))
        assert name in console.file.getvalue()  # type: ignore[attr-defined]

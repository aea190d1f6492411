"""The shipped evaluations: every class exists and takes what it is given, and rows that are
compared are comparable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance
from configs.command_line.class_paths import Kind
from configs.command_line.loading import CONFIGS
from eval.cli import make_parser
from eval.methods.rows import Method, build_rows, class_of, unique_labels
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.clover import Clover
from modules.drafters.retrieval.rasd import Rasd
from modules.trees.reranked import RerankedTree
from tests.fakes import tiny_target
from tests.test_style import ROOT

STUDIES = sorted((ROOT / "docs" / "benchmarks").glob("*/methods*.yaml"))
FILES = [*sorted((CONFIGS / "eval").glob("*.yaml")), *STUDIES]


def methods(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a shipped evaluation, by name."""
    rows = yaml.safe_load((CONFIGS / "eval" / f"{name}.yaml").read_text())["methods"]
    return {row["name"]: row for row in rows}


def test_there_are_studies() -> None:
    assert STUDIES


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_row_can_be_built(file: Path) -> None:
    settings = make_parser().parse_args(["--config", str(file)])
    assert len(settings.methods) > 1
    rows = yaml.safe_load(file.read_text())["methods"]
    assert unique_labels([Method(**row) for row in rows])
    for row in rows:
        for key, given in (("drafter", 1), ("decoder", 1), ("builder", 0), ("rule", 0)):
            if isinstance(row.get(key), dict) and "class_path" in row[key]:
                class_of(row[key], row["name"], Kind[key.upper()], given)


def test_drafting_without_training_is_whole() -> None:
    expected = {
        "hf_prompt_lookup",
        "hf_assisted",
        "prompt_lookup",
        "suffix",
        "token_recycling",
        "rest",
        "aded",
        "rasd",
        "lookahead",
        "input_guided",
    }
    variants = {
        "token_recycling_cold",
        "suffix_corpus",
        "suffix_token_recycling",
        "merged_tokens",
    }
    rows = methods("training_free")
    assert expected | variants == set(rows)
    assert not any(isinstance(row.get("drafter"), str) for row in rows.values())
    assert expected < set(methods("table"))


def test_assisted_generation_and_ours_draft_with_the_same_model() -> None:
    rows = methods("table")
    assert (
        rows["hf_assisted"]["decoder"]["init_args"]["assistant"] == rows["independent"]["drafter"]
    )


def test_the_fused_tree_has_the_nodes_of_its_partner_and_of_retrieval() -> None:
    rows = methods("table")
    fused, alone = rows["rasd_eagle3_bf16"], rows["eagle3_full_bf16"]
    given = fused["drafter"]["init_args"]
    assert given["partner"] == alone["drafter"] and given["builder"] == alone["builder"]
    assert given["datastore"] == rows["rasd"]["drafter"]["init_args"]["datastore"]
    assert (
        given["tokens"] - given["retrieved"] == alone["budget"]
        and fused["precision"] == alone["precision"]
    )


def test_a_partner_is_loaded_from_its_run(tmp_path: Path) -> None:
    target = tiny_target()
    drafter = Clover(target.shape)
    drafter.initialise(target)
    save_pretrained(drafter, tmp_path / "clover" / "drafter", Provenance.of(target))
    spec = {**methods("table")["rasd_eagle3_bf16"]["drafter"]}
    shallow = {**spec["init_args"]["builder"], "init_args": {"depth": 3}}
    spec["init_args"] |= {
        "partner": str(tmp_path / "clover"),
        "datastore": None,
        "builder": shallow,
    }
    rows = build_rows(
        [Method("fused", spec, precision="bfloat16"), Method("clover", str(tmp_path / "clover"))],
        target,
        Sampling(),
    )
    by_name = {row.name: row for row in rows}
    assert by_name["fused"].budget == 9 and by_name["clover"].budget == 5
    drafter = cast(SpeculativeDecoder, by_name["fused"].decoder).drafter
    assert isinstance(drafter, Rasd) and isinstance(drafter.builds, RerankedTree)
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.bfloat16}
    assert by_name["fused"].drafter_parameters == by_name["clover"].drafter_parameters > 0
    prompts = [[7, 8, 9, 7, 8], [20, 30]]
    plain = by_name["autoregressive"].decoder.decode(prompts, Sampling(), 12)
    fused = by_name["fused"].decoder.decode(prompts, Sampling(), 12)
    assert [trace.ids for trace in fused] == [trace.ids for trace in plain]

"""The shipped evaluations: every class exists and takes what it is given, and rows that are compared are comparable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance
from data.configfiles import CONFIGS
from eval.methods import Method, build_rows, class_of, unique_labels
from modules.core.drafter import Sampling
from modules.heads.clover import Clover
from modules.heads.clover2 import Clover2
from tests.fakes import tiny_target

FILES = sorted((CONFIGS / "eval").glob("*.yaml"))


def methods(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a shipped evaluation, by name."""
    rows = yaml.safe_load((CONFIGS / "eval" / f"{name}.yaml").read_text())["methods"]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_can_be_built(file: Path) -> None:
    rows = yaml.safe_load(file.read_text())["methods"]
    assert unique_labels([Method(**row) for row in rows])
    for row in rows:
        for key, given in (("drafter", 1), ("decoder", 1), ("builder", 0), ("rule", 0)):
            if isinstance(row.get(key), dict) and "class_path" in row[key]:
                class_of(row[key], row["name"], given)


def test_drafting_without_training_is_whole() -> None:
    expected = {"hf_prompt_lookup", "hf_assisted", "prompt_lookup", "suffix", "token_recycling", "token_recycling_cold",
                "rest", "aded", "rasd", "lookahead"}
    rows = methods("training_free")
    assert expected == set(rows)
    assert not any(isinstance(row.get("drafter"), str) for row in rows.values())
    assert expected - {"token_recycling_cold"} < set(methods("fused"))


def test_assisted_generation_and_ours_draft_with_the_same_model() -> None:
    rows = methods("fused")
    assert rows["hf_assisted"]["decoder"]["init_args"]["assistant"] == rows["independent"]["drafter"]


def test_the_fused_tree_has_the_nodes_of_its_partner_and_of_retrieval() -> None:
    rows = methods("fused")
    fused, alone = rows["rasd_clover2"]["drafter"]["init_args"], rows["rasd"]["drafter"]["init_args"]
    assert fused["partner"] == rows["clover2_own_tree"]["drafter"] and fused["datastore"] == alone["datastore"]
    assert fused["tokens"] - fused["retrieved"] == Clover2(tiny_target().shape).default_budget


def test_a_partner_is_loaded_from_its_run(tmp_path: Path) -> None:
    target = tiny_target()
    drafter = Clover(target.shape)
    drafter.initialise(target)
    save_pretrained(drafter, tmp_path / "clover" / "drafter", Provenance.of(target))
    spec = {**methods("fused")["rasd_clover2"]["drafter"]}
    spec["init_args"] = {**spec["init_args"], "partner": str(tmp_path / "clover"), "datastore": None}
    rows = build_rows([Method("fused", spec), Method("clover", str(tmp_path / "clover"))], target, Sampling())
    by_name = {row.name: row for row in rows}
    assert by_name["fused"].budget == 8 and by_name["clover"].budget == 5
    assert by_name["fused"].drafter_parameters == by_name["clover"].drafter_parameters > 0
    prompts = [[7, 8, 9, 7, 8], [20, 30]]
    plain = by_name["autoregressive"].decoder.decode(prompts, Sampling(), 12)
    fused = by_name["fused"].decoder.decode(prompts, Sampling(), 12)
    assert [trace.ids for trace in fused] == [trace.ids for trace in plain]

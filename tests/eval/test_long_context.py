"""The shipped evaluation of long contexts, whole, on a tiny target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.command_line.loading import CONFIGS
from eval import evaluation
from eval.evaluation import Evaluation, evaluate
from eval.methods.rows import Method
from tests.fakes import tiny_target

TASK = """
source: generated:needle
name: needle
question: question
reference: answers
metric: named_share
lengths: [400, 700]
count: 1
"""


def test_every_shipped_row_runs_and_is_reported_by_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A character is a token: prompts of about 1,200 and 2,600.
    target: Any = tiny_target(layers=4)
    target.model.config.max_position_embeddings = 4096
    monkeypatch.setattr(evaluation, "load_target", lambda *_: target)
    (tmp_path / "needle.yaml").write_text(TASK)
    rows = yaml.safe_load((CONFIGS / "eval" / "long_context.yaml").read_text())["methods"]
    settings = Evaluation(
        prompts=[str(tmp_path / "needle.yaml")],
        methods=[Method(**row) for row in rows],
        max_new_tokens=5,
        quality="all",
        dtype="float64",
    )
    report = evaluate(settings, tmp_path / "out")
    methods = {method["name"]: method for method in report["methods"]}
    assert set(methods) == {"autoregressive", *(row["name"] for row in rows)}
    plain = methods["autoregressive"]["by_length"]
    assert [entry["context"] for entry in plain] == [1024, 2048]
    # 4 layers, keys and values of 2 heads of 8 numbers in float64, of all slots.
    slot = 4 * 2 * 2 * 8 * 8
    for entry in plain:
        assert 0 <= entry["kv_bytes_per_step"] / slot - entry["prompt_tokens"] < 6
    for name, method in methods.items():
        assert [entry["context"] for entry in method["by_length"]] == [1024, 2048]
        assert all(entry["score"] is not None for entry in method["by_length"])
        lossless = name == "autoregressive" or name.startswith("draft_")
        assert method["claims_lossless"] == lossless
        assert method["lossless"] or not lossless
        # Rows that choose without all keys read less than full attention does.
        if name in ("window", "sentence_kv", "act_qkv", "act_qkv_mean"):
            assert 0 < method["quality"]["kv_share"] < 1
            read = method["by_length"][1]["kv_bytes_per_step"]
            assert read < 0.75 * plain[1]["kv_bytes_per_step"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By length of the context" in page
    assert json.loads((tmp_path / "out" / "report.json").read_text())["methods"]

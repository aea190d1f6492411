"""Clusters of keys, and the precision of tokens inside and outside of them at equal ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.analysis.key_clusters
from eval.analysis.key_clusters import command, right_tokens
from modules.decoding.lossy.key_clusters import Ranked, k_means, precision, ranked_tokens
from tests.fakes import tiny_target


def test_keys_that_lie_together_are_a_cluster() -> None:
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]])
    which = torch.arange(60) % 3
    keys = centres[which] + 0.3 * torch.randn(60, 2, generator=torch.manual_seed(0))
    found = k_means(keys, 3, seed=2)
    assert [len(set(found[which == k].tolist())) for k in range(3)] == [1, 1, 1]
    assert len(set(found.tolist())) == 3
    with pytest.raises(ValueError, match="between 1 and 60 keys, got 61"):
        k_means(keys, 61)


def test_tokens_are_ranked_below_the_likeliest() -> None:
    logits, clusters = torch.tensor([1.0, 5.0, 3.0, 4.0]), torch.tensor([0, 1, 1, 0])
    assert list(ranked_tokens(logits, clusters, {2}, 3)) == [
        Ranked(2, False, False),
        Ranked(3, True, True),
    ]


def test_precision_compares_equal_ranks() -> None:
    """Rank 2 is right more often, and mostly inside; rank 4 has only one side."""
    tokens = [Ranked(2, True, True)] * 3 + [Ranked(2, True, False), Ranked(2, False, True)]
    tokens += [Ranked(3, True, False)] * 2 + [Ranked(3, False, False)] * 2
    tokens += [Ranked(4, False, True)] * 9
    assert precision(tokens, 2, 4) == {True: (0.25, 6), False: (pytest.approx(1 / 3), 3)}


def test_the_command_probes_a_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tiny_target()
    monkeypatch.setattr(eval.analysis.key_clusters, "load_target", lambda *_, **__: target)
    assert command(["--target", "tiny", "--clusters", "4"]) == 0
    printed = capsys.readouterr().out
    assert "16 probes, 4 clusters, tiny" in printed and "ranks 21-50: right inside" in printed
    assert right_tokens(target.tokenizer, ["ab"]) == set(target.tokenizer.encode("a "))


def test_no_cluster_is_refused_before_the_target_is_loaded() -> None:
    with pytest.raises(ValueError, match="clusters must be at least 1, got 0"):
        eval.analysis.key_clusters.compare("nowhere", clusters=0)


@pytest.mark.parametrize(
    "row",
    [{"answers": ["a"]}, {"prompt": "a", "answers": "b"}, {"prompt": "a", "answers": ["b", ""]}],
)
def test_probes_without_texts_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    """Before the target is loaded."""
    (tmp_path / "probes.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="a list of texts `answers`, none of them empty"):
        eval.analysis.key_clusters.compare("nowhere", probes=str(tmp_path / "probes.jsonl"))

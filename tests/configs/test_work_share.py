"""Shares of the work: no piece twice, none left out; and several writers of one feature cache."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock, Thread, get_ident
from typing import Any

import pytest
import torch

import data.feature_cache.cache as features
from configs.command_line.work_share import Share
from data.conversations import Tokens
from data.datamodule import ConversationData
from data.feature_cache.cache import FeatureCache, cache_features, read_manifest
from modules.target.target import Target
from tests.data.test_packing import document
from tests.fakes import tiny_target

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "batch_tokens": 32,
    "shard_tokens": 40,
    "progress": False,
}
DOCUMENTS = [document(3 + 5 * i % 17, i) for i in range(40)]


def ids(batch: Any) -> list[tuple[int, ...]]:
    """The documents of a batch of single ones."""
    return [
        tuple(row[real].tolist())
        for row, real in zip(batch.input_ids, batch.document_ids >= 0, strict=True)
    ]


@pytest.fixture()
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every document that a target computes."""
    seen: list[tuple[int, ...]] = []
    run, lock = Target.features, Lock()

    def counted(self: Target, batch: Any, names: Any) -> Any:
        with lock:
            seen.extend(ids(batch))
        return run(self, batch, names)

    monkeypatch.setattr(Target, "features", counted)
    return seen


def keys(manifest: dict[str, Any]) -> list[str]:
    return [key for shard in manifest["shards"] for key, _ in shard["documents"]]


def same_cache(one: Path, other: Path, target: Target, documents: list[Tokens]) -> None:
    first, second = (
        FeatureCache(folder, target.fingerprint(), ["final"]) for folder in (one, other)
    )
    assert sorted(keys(first.manifest)) == sorted(keys(second.manifest)) and len(
        keys(first.manifest)
    ) == len(documents)
    first.require(documents)
    for tokens in documents:
        torch.testing.assert_close(
            first.read(tokens.key), second.read(tokens.key), rtol=1e-4, atol=1e-5
        )


def test_every_piece_falls_to_exactly_one_share() -> None:
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(300)]
    for count in (1, 3, 8):
        taken = [[name for name in names if Share(i, count).takes(name)] for i in range(count)]
        assert sorted(name for part in taken for name in part) == sorted(names)
        assert min(map(len, taken)) > 300 / count / 2


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_share_that_is_none_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(ValueError, match="--shard must be I/N"):
        Share.parse(text, "--shard")
    assert Share.parse("1/2", "--shard") == Share(1, 2)


def test_a_process_knows_its_share_from_who_started_it() -> None:
    assert Share.of_process({"RANK": "3", "WORLD_SIZE": "4"}) == Share(3, 4)
    assert Share.of_process({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == Share(1, 2)
    assert Share.of_process({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Share()


def test_writers_at_the_same_time_leave_what_a_single_one_does(
    tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three writers, each of which has states to write before any has written a shard."""
    barrier, append, met = Barrier(3, timeout=60), features._append_shard, set()

    def meet(*arguments: Any) -> None:
        if get_ident() not in met:
            met.add(get_ident())
            barrier.wait()
        append(*arguments)

    monkeypatch.setattr(features, "_append_shard", meet)
    targets = [tiny_target(dtype=torch.float32) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(
                lambda i: cache_features(
                    targets[i],
                    DOCUMENTS,
                    ["final"],
                    tmp_path / "shared",
                    **SMALL,
                    share=Share(i, 3),
                ),
                range(3),
            )
        )
    assert sorted(computed) == sorted(tuple(tokens.input_ids.tolist()) for tokens in DOCUMENTS)
    monkeypatch.setattr(features, "_append_shard", append)
    cache_features(targets[0], DOCUMENTS, ["final"], tmp_path / "single", **SMALL)
    same_cache(tmp_path / "shared", tmp_path / "single", targets[0], DOCUMENTS)
    assert len(read_manifest(tmp_path / "shared")["shards"]) > 3


def test_who_writes_everything_adds_what_the_shares_left(
    tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    target = tiny_target(dtype=torch.float32)
    cache_features(target, DOCUMENTS, ["final"], tmp_path, **SMALL, share=Share(1, 3))
    mine = [tokens for tokens in DOCUMENTS if Share(1, 3).takes(tokens.key)]
    assert sorted(computed) == sorted(tuple(tokens.input_ids.tolist()) for tokens in mine)
    with pytest.raises(
        ValueError, match=f"lack {len(DOCUMENTS) - len(mine)} of {len(DOCUMENTS)} documents"
    ):
        FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(DOCUMENTS)
    cache_features(target, DOCUMENTS, ["final"], tmp_path, **SMALL)
    assert len(computed) == len(set(computed)) == len(DOCUMENTS)


def test_who_writes_everything_waits_for_a_share_under_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tiny_target(dtype=torch.float32)
    tmp_path.joinpath("cache").mkdir()
    with features._writing(tmp_path / "cache", Share(0, 2)):
        whole = Thread(
            target=cache_features,
            args=(target, DOCUMENTS, ["final"], tmp_path / "cache"),
            kwargs=SMALL,
        )
        whole.start()
        whole.join(0.5)
        assert whole.is_alive() and not (tmp_path / "cache" / "manifest.json").exists()
    whole.join(60)
    assert "waiting for another process" in caplog.text
    FeatureCache(tmp_path / "cache", target.fingerprint(), ["final"]).require(DOCUMENTS)


def test_ranks_of_a_training_share_the_work_before_they_begin(
    tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each computes its own part first; the one that comes last finds all of it there."""
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"number {n}", "response": "so it is"}) + "\n" for n in range(24)
        )
    )
    order, write = [], features.cache_features

    def noted(*arguments: Any, **options: Any) -> Path:
        before = len(computed)
        folder = write(*arguments, **options)
        order.append((options["share"], len(computed) - before))
        return folder

    monkeypatch.setattr("data.datamodule.cache_features", noted)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        ConversationData(str(file), max_length=64, features=str(tmp_path / "cache")).bind(
            tiny_target(dtype=torch.float32), ("final",)
        )
    (first, own), (everything, rest), later, last = order
    assert (first, everything) == (Share(0, 2), None) and own + rest == 24 and 0 < own < 24
    assert later == (Share(1, 2), 0) and last == (None, 0)

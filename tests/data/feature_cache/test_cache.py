"""The feature cache gives back what the target computes, grows, resumes, and refuses what is
foreign or damaged.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

import data.feature_cache.cache as cache_module
from configs.command_line.work_share import Share
from data.conversations import Tokens
from data.feature_cache.cache import CacheDtype, FeatureCache, cache_features, read_manifest
from data.feature_cache.rounding import rms_error, state_bytes
from data.packing import collate
from modules.target.target import Target
from tests import fakes
from tests.data.test_packing import document
from tests.fakes import tiny_target

SMALL = {"batch_tokens": 32, "shard_tokens": 40, "progress": False}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.float32)


@pytest.fixture(scope="module")
def documents() -> list[Tokens]:
    return [document(3 + 5 * i % 17, i) for i in range(14)]


def alone(target: Target, tokens: Tokens, name: str | int) -> torch.Tensor:
    return target.features(collate([[tokens]]), [name])[name][0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_cached_states_equal_the_targets(
    target: Target, documents: list[Tokens], tmp_path: Path, dtype: CacheDtype, tolerance: float
) -> None:
    cache_features(target, documents, ["final", 1], tmp_path, dtype=dtype, **SMALL)
    cache = FeatureCache(tmp_path, target.fingerprint(), [1, "final"])
    cache.require(documents)
    for tokens in documents:
        states = cache.read(tokens.key)
        assert list(states) == [1, "final"] and states["final"].dtype == getattr(torch, dtype)
        for name, found in states.items():
            torch.testing.assert_close(
                found.float(), alone(target, tokens, name), rtol=tolerance, atol=tolerance
            )


def test_int8_states_are_a_percent_off_and_small(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents, ["final"], tmp_path, dtype="int8", **SMALL)
    cache = FeatureCache(tmp_path, target.fingerprint(), ["final"])
    for tokens in documents:
        found, exact = cache.read(tokens.key)["final"], alone(target, tokens, "final")
        assert found.dtype == torch.float32
        assert rms_error(exact, found) < 0.015
    shards = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert shards < 1.5 * state_bytes(32, "int8") * sum(map(len, documents)) + 700 * len(
        list(tmp_path.glob("shard*"))
    )


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    target: Target, documents: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "data.feature_cache.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=100)
    )
    monkeypatch.setattr(Target, "features", lambda *_: pytest.fail("computed"))
    with pytest.raises(
        ValueError, match=r"need 0.00 GiB more and the disk has 0.00 free: set data.features_dtype"
    ):
        cache_features(target, documents, ["final"], tmp_path, **SMALL)


def test_the_size_is_said_and_a_users_limit_is_kept_before_anything_is_computed(
    target: Target,
    documents: list[Tokens],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The limit is the folder's: what is there counts, and every share counts the others' documents
    too.
    """
    loud, tokens = {**SMALL, "progress": True}, sum(map(len, documents))
    whole = tokens * 2 * state_bytes(32, "bfloat16") / 2**30
    cache_features(target, documents[:6], ["final", 1], tmp_path, gib=whole, **loud)
    said, written = capsys.readouterr().out, sum(map(len, documents[:6]))
    assert f"{written} tokens to add, 0.00 GiB in bfloat16" in said
    assert re.search(rf": {written} tokens in \d+ s, \d+ tokens/s\n", said)
    with monkeypatch.context() as patch:
        patch.setattr(Target, "features", lambda *_: pytest.fail("computed"))
        for share in (None, Share(0, 4), Share(3, 4)):
            with pytest.raises(
                ValueError,
                match=r"data.features_gib is \S+, but features .* would hold .* raise it",
            ):
                cache_features(
                    target,
                    documents,
                    ["final", 1],
                    tmp_path,
                    gib=0.99 * whole,
                    share=share,
                    **SMALL,
                )
    cache_features(target, documents, ["final", 1], tmp_path, gib=whole, **SMALL)
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)
    capsys.readouterr()
    cache_features(target, documents, ["final", 1], tmp_path, gib=whole, **loud)
    assert "to add" not in capsys.readouterr().out


def test_a_cache_in_another_dtype_is_refused(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents[:6], ["final"], tmp_path, **SMALL)
    with pytest.raises(
        ValueError, match="are stored in bfloat16, but data.features_dtype is int8: give another"
    ):
        cache_features(target, documents, ["final"], tmp_path, dtype="int8", **SMALL)


def test_int8_takes_about_half_of_bfloat16_at_the_embedded_targets_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states' bytes, and the whole files with their headers."""
    monkeypatch.setitem(fakes.DIMENSIONS, "hidden_size", 576)
    wide, documents = (
        tiny_target(dtype=torch.float32, layers=1),
        [document(60 + i, i) for i in range(8)],
    )
    sizes: dict[str, int] = {}
    for dtype in get_args(CacheDtype):
        cache_features(wide, documents, ["final"], tmp_path / dtype, dtype=dtype, progress=False)
        sizes[dtype] = sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.safetensors"))
    assert state_bytes(576, "int8") <= 0.51 * state_bytes(576, "bfloat16")
    assert sizes["int8"] <= 0.55 * sizes["bfloat16"] <= 0.55 * 0.55 * sizes["float32"]


_KILLED = """
import os, signal, sys, torch
import data.feature_cache.cache as features
from tests.data.feature_cache.test_cache import SMALL, document
from tests.fakes import tiny_target
torch.set_num_threads(1)
written, save = [], features.save_file
def dying(states, path):
    save(states, path)
    if len(written) == 2:
        path.write_bytes(path.read_bytes()[:64])
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
features.save_file = dying
documents = [document(3 + 5 * i % 17, i) for i in range(14)]
target = tiny_target(dtype=torch.float32)
features.cache_features(target, documents, ["final"], sys.argv[1], **SMALL)
"""


def test_a_cache_killed_while_it_writes_a_shard_ends_as_an_unbroken_one(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "killed")], cwd=root, check=False
    )
    assert killed.returncode == -9
    for name in ("killed", "whole"):
        cache_features(target, documents, ["final"], tmp_path / name, **SMALL)
    first, second = (
        FeatureCache(tmp_path / name, target.fingerprint(), ["final"])
        for name in ("killed", "whole")
    )
    first.require(documents)
    keys = [key for shard in first.manifest["shards"] for key, _ in shard["documents"]]
    assert len(keys) == len(set(keys)) == len(documents)
    files = {
        path.name
        for path in (tmp_path / "killed").iterdir()
        if path.name.startswith("shard-") or "partial" in path.name
    }
    assert files == {shard["file"] for shard in first.manifest["shards"]}
    for tokens in documents:
        assert torch.equal(first.read(tokens.key)["final"], second.read(tokens.key)["final"])


def test_a_cache_is_extended_and_only_with_what_it_lacks(
    target: Target, documents: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_features(target, documents[:6], ["final"], tmp_path, **SMALL)
    ran: list[int] = []
    features = Target.features
    monkeypatch.setattr(
        Target,
        "features",
        lambda self, batch, names: (
            ran.append(int((batch.document_ids >= 0).sum())),
            features(self, batch, names),
        )[1],
    )
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    assert sum(ran) == sum(map(len, documents[6:]))
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_an_interrupted_run_keeps_its_finished_shards(
    target: Target, documents: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data.feature_cache.cache as module

    write, written = module.save_file, []

    def killed(states: dict, path: Path) -> None:
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        write(states, path)

    monkeypatch.setattr(module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_features(target, documents, ["final"], tmp_path, **SMALL)
    monkeypatch.setattr(module, "save_file", write)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.safetensors")}
    assert len(before) == 2
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_a_deleted_shard_is_made_again(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    victim = sorted(tmp_path.glob("shard-*"))[0]
    victim.unlink()
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    assert victim.exists()
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_a_damaged_shard_is_refused_by_name(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    victim = sorted(tmp_path.glob("shard-*"))[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"{victim.name}.* is missing or damaged"):
        FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_what_is_foreign_or_missing_is_refused(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents[:3], ["final"], tmp_path, **SMALL)
    other = tiny_target(dtype=torch.float32, seed=1)
    with pytest.raises(ValueError, match="belong to target 'tiny-llama'"):
        cache_features(other, documents, ["final"], tmp_path, **SMALL)
    with pytest.raises(ValueError, match="hold states final and lack pre_norm"):
        FeatureCache(tmp_path, target.fingerprint(), ["pre_norm"])
    with pytest.raises(ValueError, match="lack 11 of 14 documents"):
        FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)
    with pytest.raises(ValueError, match="hold no feature cache"):
        FeatureCache(tmp_path / "none", target.fingerprint())


def test_the_manifest_says_what_the_cache_holds(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    manifest = read_manifest(tmp_path)
    assert manifest["fingerprint"] == target.fingerprint() and manifest["dtype"] == "bfloat16"
    assert sum(shard["tokens"] for shard in manifest["shards"]) == sum(map(len, documents))
    assert not list(tmp_path.glob("*.partial"))


def test_states_that_overflow_are_refused(
    target: Target, documents: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Target,
        "features",
        lambda self, batch, names: {
            name: torch.full((*batch.input_ids.shape, 4), float("nan")) for name in names
        },
    )
    with pytest.raises(ValueError, match="NaN or infinity"):
        cache_features(target, documents, ["final"], tmp_path, **SMALL)


def test_shards_are_readable_by_others_as_the_manifest_is(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    shards = list(tmp_path.rglob("*.safetensors"))
    manifest = next(path for path in tmp_path.rglob("*.json"))
    assert shards and {path.stat().st_mode for path in shards} == {manifest.stat().st_mode}


# -- terabytes -------------------------------------------------------------------------------------


def test_a_shard_is_one_more_line_whatever_the_size_of_the_cache(
    target: Target, documents: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_features(target, documents[:3], ["final"], tmp_path, **SMALL)
    before = (tmp_path / "manifest.json").stat()
    lines = (tmp_path / "shards.jsonl").read_text()
    monkeypatch.setattr(cache_module, "_write_manifest", lambda *_: pytest.fail("written anew"))
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    after = (tmp_path / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (tmp_path / "shards.jsonl").read_text().startswith(lines)
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_a_line_that_a_killed_process_left_is_cut_off(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents[:3], ["final"], tmp_path, **SMALL)
    with open(tmp_path / "shards.jsonl", "a") as file:
        file.write('{"file": "shard-half')
    known = len(read_manifest(tmp_path)["shards"])
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    assert len(read_manifest(tmp_path)["shards"]) > known
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_a_cache_of_format_1_is_read_and_extended(
    target: Target, documents: list[Tokens], tmp_path: Path
) -> None:
    cache_features(target, documents[:3], ["final"], tmp_path, **SMALL)
    manifest = read_manifest(tmp_path)
    for shard in manifest["shards"]:
        del shard["bytes"]
    (tmp_path / "shards.jsonl").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents[:3])
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    assert read_manifest(tmp_path)["format"] == 2
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)


def test_a_large_cache_is_compared_by_sizes(
    target: Target, documents: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading all of it before a training would take hours, in every process."""
    cache_features(target, documents, ["final"], tmp_path, **SMALL)
    monkeypatch.setattr(cache_module, "_HASHED_GIB", 0.0)
    monkeypatch.setattr(cache_module, "_sha256", lambda _: pytest.fail("hashed"))
    FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)
    victim = sorted(tmp_path.glob("shard-*"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{victim.name}.* is missing or damaged"):
        FeatureCache(tmp_path, target.fingerprint(), ["final"]).require(documents)

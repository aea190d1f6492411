"""States from vLLM are those of the target, under the same fingerprint, and a killed extraction
goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import features
from data.datamodule import ConversationData
from data.feature_cache.cache import FeatureCache, cache_features
from data.feature_cache.vllm_states import VllmStates, engine_arguments, stored_fingerprint
from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName
from modules.target.head_only.target import HeadTarget, load_head
from modules.target.loading import load_target
from tests.fakes import tiny_target

NAMES: list[StateName] = [0, 1, "pre_norm", "final"]
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved target; GPT-2's embedding is tied to its head."""
    target = tiny_target(request.param, dtype=torch.float32)
    place = tmp_path_factory.mktemp(request.param)
    target.stock.save_pretrained(place)
    target.tokenizer.save_pretrained(place)
    return str(place)


class FakeLLM:
    """Runs the target, and writes states as vLLM's connector does: [T, layers, H]."""

    made: list[dict[str, Any]] = []
    dies_at = 0

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.count = arguments, 0
        FakeLLM.made.append(arguments)
        self.target = load_target(arguments["model"], arguments["dtype"])
        method = arguments["speculative_config"]
        self.layers = method["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]

    def generate(self, prompts: list[dict[str, list[int]]], once: Any, use_tqdm: bool) -> list[Any]:
        extra = self.arguments["kv_transfer_config"]["kv_connector_extra_config"]
        answers = []
        for prompt in prompts:
            self.count += 1
            if self.count == FakeLLM.dies_at:
                raise KeyboardInterrupt
            ids_T = torch.tensor(prompt["prompt_token_ids"])
            assert len(ids_T) < self.arguments["max_model_len"] and once.max_tokens == 1
            batch = TextBatch(
                ids_T[None],
                torch.zeros_like(ids_T, dtype=torch.bool)[None],
                torch.arange(len(ids_T))[None],
                torch.zeros_like(ids_T)[None],
            )
            depth = self.target.shape.num_layers
            names = ["pre_norm" if layer == depth else layer for layer in self.layers]
            states = self.target.features(batch, names)
            path = f"{extra['shared_storage_path']}/{self.count}.safetensors"
            tensors = torch.stack([states[name][0] for name in names], 1)
            save_file({"hidden_states": tensors, "token_ids": ids_T}, path)
            answers.append(SimpleNamespace(kv_transfer_params={"hidden_states_path": path}))
        return answers


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, connector = ModuleType("vllm"), ModuleType(CONNECTOR)
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    connector.load_hidden_states = load_file  # type: ignore[attr-defined]
    connector.cleanup_hidden_states = lambda path: Path(path).unlink()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, CONNECTOR, connector)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "dies_at", 0)


def chats(place: Path) -> str:
    rows = [{"prompt": f"say {i}", "response": "ok " * (i + 1)} for i in range(9)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place / "rows.jsonl")


def data(place: Path, name: str) -> ConversationData:
    return ConversationData(
        chats(place),
        features=str(place / name),
        features_dtype="float32",
        max_length=64,
        validation_fraction=0.3,
    )


def head_of(folder: str, dtype: str = "float32") -> HeadTarget:
    return load_head(folder, "", dtype, "cpu")


def test_the_fingerprint_is_that_of_the_loaded_target(folder: str) -> None:
    for dtype in ("float32", "bfloat16"):
        loaded, head = load_target(folder, dtype, "cpu"), head_of(folder, dtype)
        assert stored_fingerprint(head) == loaded.fingerprint()
        assert head.head_digest() == loaded.head_digest()


def test_a_checkpoint_of_other_names_is_refused(folder: str) -> None:
    head = head_of(folder)
    stored: Any = head.architecture
    lost = next(key for key in stored.stored.files if ".1." in key)
    files = {key: file for key, file in stored.stored.files.items() if key != lost}
    stored.stored = replace(stored.stored, files=files)
    with pytest.raises(ValueError, match="its checkpoint holds no '.*1.*': its states can only"):
        stored_fingerprint(head)


def test_the_cache_is_that_of_the_target_itself(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"target": folder, "dtype": "float32", "states": NAMES}
    features.cache(data(tmp_path, "plain"), **common)
    features.cache(data(tmp_path, "served"), **common, engine="vllm", vllm={"seed": 3})
    (arguments,) = FakeLLM.made
    assert arguments["seed"] == 3 and not arguments["enable_prefix_caching"]
    assert not arguments["enable_chunked_prefill"]
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"]
    fingerprint = load_target(folder, "float32").fingerprint()
    plain, served = (
        FeatureCache(tmp_path / name, fingerprint, NAMES) for name in ("plain", "served")
    )
    assert {**plain.manifest, "shards": 0} == {**served.manifest, "shards": 0}
    keys = [key for shard in plain.manifest["shards"] for key, _ in shard["documents"]]
    assert len(keys) == 9
    for key in keys:
        states = plain.read(key), served.read(key)
        for name in NAMES:
            # Batches of other widths round differently; states are up to 30 here.
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-3)


def test_a_killed_extraction_goes_on(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = data(tmp_path, "cache")
    shape = head_of(folder)
    conversations.read(shape)
    documents = [*conversations.documents, *conversations.held_out]

    def extract() -> Path:
        states = VllmStates(shape, NAMES, 64)
        return cache_features(
            shape, documents, NAMES, tmp_path / "cache", "float32", 64, 40, False, computed=states
        )

    monkeypatch.setattr(FakeLLM, "dies_at", 6)
    with pytest.raises(KeyboardInterrupt):
        extract()
    monkeypatch.setattr(FakeLLM, "dies_at", 0)
    manifest = FeatureCache(tmp_path / "cache", shape.fingerprint(), NAMES).manifest
    kept = sum(len(shard["documents"]) for shard in manifest["shards"])
    assert 0 < kept < 6
    extract()
    FeatureCache(tmp_path / "cache", shape.fingerprint(), NAMES).require(documents)
    extract()
    assert len(FakeLLM.made) == 2, "nothing is missing, so no engine starts"


def test_states_of_other_tokens_are_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shortened(path: str) -> dict[str, torch.Tensor]:
        loaded = load_file(path)
        return {**loaded, "hidden_states": loaded["hidden_states"][:-1]}

    monkeypatch.setattr(sys.modules[CONNECTOR], "load_hidden_states", shortened)
    with pytest.raises(ValueError, match="engine 'vllm' gave states of .* for a document of"):
        features.cache(data(tmp_path, "c"), folder, "float32", states=NAMES, engine="vllm")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu"}, "device 'cpu': vLLM runs on what it was built for"),
        ({"precision": "bf16-mixed"}, "precision 'bf16-mixed' belongs to this project's own"),
        ({"dtype": "float64"}, "dtype 'float64': vLLM does not compute in it"),
    ],
)
def test_settings_that_vllm_lacks(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        features.cache(data(tmp_path, "c"), "x", states=NAMES, engine="vllm", **settings)


def test_vllm_is_one_process_and_its_arguments_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="vllm: arguments of vLLM have no effect: add --engine"):
        features.cache(data(tmp_path, "c"), "x", states=NAMES, vllm={"seed": 3})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="computes in one process: leave out torchrun"):
        features.cache(data(tmp_path, "c"), "x", states=NAMES, engine="vllm")


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="engine 'vllm': vLLM is not installed"):
        features.cache(data(tmp_path, "c"), "x", states=NAMES, engine="vllm")


def test_vllm_numbers_layers_as_the_target_does(folder: str) -> None:
    shape = head_of(folder)
    arguments = engine_arguments(folder, shape, [0, 2], 9, "/files")
    method = arguments["speculative_config"]
    assert method["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2]
    connector = arguments["kv_transfer_config"]["kv_connector"]
    assert (connector == "SynchronousConnector") == (not torch.cuda.is_available())

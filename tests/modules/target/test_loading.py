"""Targets in few bits and over several devices: what is asked of the libraries, and one line where
they are missing.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints.pretrained import check_compatible
from eval.evaluation import Evaluation
from eval.report.markdown import describe
from modules.contracts.rows import causal_rows
from modules.contracts.sampling import Sampling
from modules.contracts.trainable import TrainedFor
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.target import loading
from modules.target.kv_cache import SlotCache
from modules.target.loading import (
    check_loading,
    check_unquantised,
    load_target,
    loading_options,
    outline,
    truncated_config,
)
from tests.fakes import DIMENSIONS, ScriptedDrafter, tiny_target

HAS = {name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "accelerate")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny target as its library saves it, with as many columns as four bits are packed in at a
    time.
    """
    for name, size in (("hidden_size", 64), ("head_dim", 16), ("intermediate_size", 128)):
        monkeypatch.setitem(DIMENSIONS, name, size)
    target = tiny_target(dtype=torch.float32)
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "device", "words"),
    [
        (
            "4bit",
            "cpu",
            "dtype '4bit' needs bitsandbytes, which is not installed: run `pip install "
            "bitsandbytes`, or ",
        ),
        ("8bit", None, "dtype '8bit' needs bitsandbytes"),
        ("float32", "auto", "device 'auto' needs accelerate"),
        ("float32", "gpu", "device 'gpu' is unknown: use cpu, cuda or cuda:1"),
        ("float32", "cuda:7", "device 'cuda:7' is not there: torch finds 0 GPUs on this machine"),
        ("int3", "cpu", "dtype 'int3' is unknown: use one of float32, .* 4bit"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_loaded(
    dtype: str, device: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (
        lambda: check_loading(dtype, device),
        lambda: load_target("nowhere", dtype, device or "cpu"),
        lambda: Evaluation(dtype=dtype, device=device).check(),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_libraries_are_told_what_was_asked_for() -> None:
    four, eight = loading_options("4bit", "cuda:1"), loading_options("8bit", "auto")
    assert (
        four["quantization_config"].load_in_4bit
        and four["quantization_config"].bnb_4bit_quant_type == "nf4"
    )
    assert four["device_map"] == {"": "cuda:1"} and four["dtype"] == torch.bfloat16
    assert eight["quantization_config"].load_in_8bit and eight["device_map"] == "auto"
    assert loading_options("float32", "cpu") == {"dtype": torch.float32, "trust_remote_code": False}
    assert loading_options("bfloat16", "auto")["device_map"] == "auto"


def test_nothing_is_trained_on_a_packed_target() -> None:
    for call in (lambda: check_unquantised("4bit"), lambda: outline("smollm2-135m", "8bit")):
        with pytest.raises(ValueError, match="bit' is for decoding: train with bfloat16"):
            call()
    check_unquantised("bfloat16")


def packed(target: Any, bits: str) -> Any:
    """The target as if its linear layers were packed."""
    target.model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        f"load_in_{bits}": True,
    }
    return target


def test_a_packed_target_says_so_and_takes_what_was_trained_for_it_unpacked() -> None:
    plain, other = tiny_target(), packed(tiny_target(seed=1), "4bit")
    assert plain.quantisation == "" and other.quantisation == "4bit"
    assert describe(plain)["dtype"] == "float64" and describe(other)["dtype"] == "float64, 4bit"
    assert describe(plain)["parameters"] == sum(
        parameter.numel() for parameter in plain.parameters()
    )
    other.model.config.quantization_config = {"quant_method": "gptq"}
    assert other.quantisation == "gptq"
    packed_for = TrainedFor(plain.name, plain.shape, plain.fingerprint())
    assert packed_for.difference(other) is None and not packed_for.rounded(other)
    assert "has weights" in (packed_for.difference(tiny_target(seed=1)) or "")
    assert "has weights" in (replace(packed_for, name="another").difference(other) or "")


def test_a_target_rounded_to_16_bits_is_known_by_its_name(caplog) -> None:
    exact, rounded = tiny_target(dtype=torch.float32), tiny_target(dtype=torch.bfloat16)
    assert exact.fingerprint() != rounded.fingerprint()
    drafter = Medusa(exact.shape, 1)
    assert drafter.compatibility(rounded) is None, "it was not loaded from a folder"
    drafter.trained_for = TrainedFor(exact.name, exact.shape, exact.fingerprint())
    check_compatible(drafter, rounded, "runs/x")
    drafter.serve(exact)
    assert not caplog.text
    drafter.serve(rounded)
    assert "other weights than it has at bfloat16" in caplog.text
    with pytest.raises(ValueError, match="train it for this target"):
        check_compatible(drafter, tiny_target(dtype=torch.float32, seed=1), "runs/x")
    drafter.trained_for = replace(drafter.trained_for, name="another")
    with pytest.raises(ValueError, match="'runs/x' was trained for another .* for this target"):
        check_compatible(drafter, rounded, "runs/x")
    # The other way around: trained at 16 bits, used in float32.
    drafter.trained_for = TrainedFor(rounded.name, exact.shape, rounded.fingerprint(), "bfloat16")
    check_compatible(drafter, exact, "runs/x")
    assert drafter.trained_for.rounded(exact) and not drafter.trained_for.rounded(rounded)
    drafter.trained_for = replace(drafter.trained_for, dtype=None)
    with pytest.raises(ValueError, match="train it for this target"):
        check_compatible(drafter, exact, "runs/x")


def test_packed_weights_are_not_copied() -> None:
    target = packed(tiny_target(), "8bit")
    layer: Any = target.architecture.layers[0]
    layer.self_attn.q_proj.weight = torch.nn.Parameter(
        torch.zeros(4, 4, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"'layers.0.self_attn.q_proj.weight' is packed \(8bit\): use dtype"
    ):
        target.copy_weight("layers.0.self_attn.q_proj.weight")
    assert target.copy_weight("embed").is_floating_point()


def test_each_device_keeps_the_keys_and_values_of_its_own_layers() -> None:
    """The second device holds no numbers, but shapes and places: what a machine with one device can
    show.
    """
    devices = [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    cache = SlotCache(3, 1, 8, devices)
    rows = torch.arange(24.0).reshape(1, 2, 3, 4)
    cache.begin(causal_rows(torch.tensor([0]), 3))
    seen = [
        cache.update(rows.to(device) + layer, rows.to(device), layer)[0]
        for layer, device in enumerate(devices)
    ]
    assert [keys.device for keys in seen] == devices and all(
        keys.shape == (1, 2, 3, 4) for keys in seen
    )
    cache.commit(Accepted(torch.tensor([[0, 2]]), torch.tensor([2]), torch.tensor([0])))
    assert cache.lengths == [2]
    cache.begin(causal_rows(torch.tensor([2]), 1))
    for layer in (0, 2):
        keys, _ = cache.update(rows[:, :, :1] * 0, rows[:, :, :1] * 0, layer)
        assert torch.equal(keys[:, :, :2], rows[:, :, [0, 2]] + layer)
    assert {store.shape[0] for store in cache._stores.values()} == {1, 2}


@pytest.mark.skipif(not HAS["accelerate"], reason="accelerate is not installed")
def test_a_target_spread_by_accelerate_decodes_the_same(folder: str) -> None:
    spread, plain = load_target(folder, "float64", "auto"), load_target(folder, "float64")
    drafter = ScriptedDrafter(plain.shape, 0.7)
    expected = SpeculativeDecoder(plain).decode([[7, 9, 11]], Sampling(), 12)[0].ids
    assert (
        SpeculativeDecoder(spread, drafter).decode([[7, 9, 11]], Sampling(), 12)[0].ids == expected
    )


def test_a_target_that_does_not_fit_its_devices_is_refused(folder: str) -> None:
    model = load_target(folder).model
    model.model.layers[1].to("meta")
    with pytest.raises(
        ValueError, match=r"'x' does not fit .* 9 of its weights .*layers.1.self_attn.q_proj"
    ):
        loading._refuse_offloaded(model, "x")


@pytest.mark.skipif(not HAS["bitsandbytes"], reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", ["8bit", "4bit"])
def test_a_packed_target_verifies_trees(folder: str, dtype: str) -> None:
    target = load_target(folder, dtype)
    assert target.quantisation == dtype and target.parameter_count == tiny_target().parameter_count
    endless = frozenset({-1})
    plain = SpeculativeDecoder(target, stop_ids=endless).decode([[7, 9, 11]], Sampling(), 12)[0]
    decoder = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.7), stop_ids=endless)
    drafted = decoder.decode([[7, 9, 11]], Sampling(), 12)[0]
    assert len(plain.ids) == len(drafted.ids) == 12 and max(drafted.accepted) > 1
    with pytest.raises(ValueError, match="is packed"):
        target.copy_weight("layers.0.self_attn.q_proj.weight")
    assert SimpleNamespace(**describe(target)).dtype == f"bfloat16, {dtype}"


def test_lists_by_layer_are_cut_with_the_layers() -> None:
    """Kinds of attention and of experts; not lists of another length, nor ids."""
    config = tiny_target("gpt_oss", layers=2).stock.config
    config.eos_token_id = [0, 3]
    shallow = truncated_config(config, 1)
    assert shallow.layer_types == ["sliding_attention"] and shallow.num_hidden_layers == 1
    assert shallow.eos_token_id == [0, 3] and len(config.layer_types) == 2


def test_a_home_folder_is_found_without_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stored = tiny_target()
    stored.stock.save_pretrained(tmp_path / "model")
    stored.tokenizer.save_pretrained(tmp_path / "model")
    assert load_target("~/model", "float32", "cpu").shape == stored.shape
    with pytest.raises(ValueError, match="none.gguf' does not exist"):
        load_target("~/none.gguf")

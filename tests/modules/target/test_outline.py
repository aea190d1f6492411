"""What cannot serve as a target is refused in one line with its name, and before its weights are
read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modules.target import loading
from modules.target.hf_models import config_named, config_of_dict, load_named
from modules.target.loading import load_target, outline
from modules.target.outline import packing
from tests.fakes import tiny_target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny target as its library saves it."""
    target = tiny_target(dtype=torch.float32)
    target.stock.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may read weights."""

    class Never:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            pytest.fail("weights were read")

        from_config = staticmethod(AutoModelForCausalLM.from_config)

    monkeypatch.setattr(loading, "AutoModelForCausalLM", Never)


def configured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        kept = {**json.loads(path.read_text()), **values}
        path.write_text(
            json.dumps({key: value for key, value in kept.items() if value is not None})
        )

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


PACKED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "fp8": {"quant_method": "fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        name: (configured(quantization_config=told), rf"is stored packed \({name}\), .*16 bits")
        for name, told in PACKED.items()
    },
    "mixture": (
        configured(model_type="xlnet_moe"),
        "architecture 'xlnet_moe', which is not supported: use a causal language model",
    ),
    "unknown": (configured(model_type="badtype"), "architecture 'badtype', which is not supported"),
    "no attention": (
        configured(model_type="mamba", num_attention_heads=None),
        "architecture 'mamba' is not supported: no num_attention_heads",
    ),
    "untyped": (configured(model_type=None), "no config.json that names"),
    "remote code": (
        configured(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "'mine', which is not supported and brings code of its own, which is never run",
    ),
    "embedding": (
        configured(model_type="opt", word_embed_proj_dim=16),
        "of width 16 and layers of width 32",
    ),
    "no config": (without("config.json"), "no config.json that names"),
    "broken config": (written("config.json", "{"), "cannot be loaded"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "the tokenizer of target"),
    "broken tokenizer": (written("tokenizer.json", "{}"), "the tokenizer of target"),
    "no template": (without("chat_template.jinja"), "has a tokenizer without chat template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_target_is_refused_before_its_weights(
    case: str, folder: Path, no_weights: None
) -> None:
    change, words = REFUSED[case]
    change(folder)
    for load in (load_target, outline):
        with pytest.raises(ValueError, match=words) as caught:
            load(str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert "trust_remote_code" not in str(caught.value)


def test_weights_that_are_cut_are_one_line(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="target .* cannot be loaded: Safetensor") as caught:
        load_target(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_without_template_loads_where_no_chats_are_wanted(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert load_target(str(folder), chats=False).shape.hidden_size == 32


def test_an_adapters_base_is_looked_at(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, no_weights: None
) -> None:
    configured(quantization_config={"quant_method": "awq"})(folder)
    adapter = tmp_path_factory.mktemp("adapter")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder)})
    )
    with pytest.raises(ValueError, match=r"is stored packed \(awq\)"):
        load_target(str(adapter))


def test_how_weights_are_packed() -> None:
    assert packing({}) == packing({"quantization_config": None}) == ""
    assert packing({"compression_config": {"quant_method": "sparse"}}) == "sparse"
    assert packing({"quantization_config": {"bits": 4}}) == "by an unnamed method"


def test_a_config_that_drafts_is_a_language_models() -> None:
    for kind, words in (("mamba", "no max_position_embeddings in its config"), ("vit", "'vit'")):
        with pytest.raises(ValueError, match=words):
            config_of_dict({"model_type": kind}, None)


def test_a_model_that_drafts_is_looked_at_too(folder: Path) -> None:
    configured(quantization_config={"quant_method": "gptq"})(folder)
    with pytest.raises(ValueError, match=r"drafter.model '.*' is stored packed \(gptq\)"):
        config_named(str(folder), None)
    configured(quantization_config=None)(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="drafter.model '.*' cannot be loaded: Safetensor"):
        load_named(str(folder), None, tiny_target())

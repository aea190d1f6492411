"""What a target is, read from its config and tokenizer before any weight: what cannot be used is
refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from modules.target.architecture import SUPPORTED


def check_config(name: str, folder: str, what: str = "target") -> Mapping[str, Any]:
    """The values of a target's config.json, or of another model's (`what`), whose embedding may be
    of any width.

    Args:
        name: what errors call it.
        folder: a folder or Hub id; of an adapter (LoRA) its base model's config is read.

    Raises:
        ValueError: no config, an architecture that is not supported, code of its own, packed
            weights, or an embedding of another width than its layers.
    """
    with named(name, what):
        adapter = find_adapter_config_file(folder)
        if adapter is not None:
            with open(adapter, encoding="utf-8") as file:
                folder = json.load(file)["base_model_name_or_path"]
        values = PretrainedConfig.get_config_dict(folder)[0]
    told, supported = f"{what} {name!r}", f"use a model of one of {', '.join(SUPPORTED)}"
    kind = values.get("model_type")
    if kind is None:
        raise ValueError(
            f"{told} has no config.json that names its architecture (model_type): give a whole "
            "model"
        )
    if kind not in SUPPORTED:
        own = " and brings code of its own, which is never run" if values.get("auto_map") else ""
        raise ValueError(
            f"{told} has architecture {kind!r}, which is not supported{own}: {supported}"
        )
    if packed := packing(values):
        raise ValueError(
            f"{told} is stored packed ({packed}), which is not supported: give the model that it "
            "was made from in 16 bits (--dtype 8bit or 4bit packs that one for decoding)"
        )
    width = values.get("word_embed_proj_dim") or values.get("hidden_size")
    if width != values.get("hidden_size") and what == "target":
        raise ValueError(
            f"{told} has embeddings of width {width} and layers of width {values['hidden_size']}, "
            "which drafters cannot be built on: use a target whose widths are equal"
        )
    return values


def packing(config: Mapping[str, Any]) -> str:
    """How the weights of a checkpoint are packed, by its config: gptq, awq, compressed-tensors,
    fp8, mxfp4, 4bit, …; or nothing. (Some of these transformers unpacks without a word where no
    kernels are.)"""
    told = config.get("quantization_config") or config.get("compression_config")
    if not told:
        return ""
    bits = next((name for name in ("4bit", "8bit") if told.get(f"load_in_{name}")), "")
    return str(told.get("quant_method") or bits or "by an unnamed method")


def read_tokenizer(name: str, folder: str, chats: bool = True, what: str = "target") -> Any:
    """A target's tokenizer.

    Raises:
        ValueError: no tokenizer, one that cannot be read, or, where `chats` are wanted, one without
            a chat template.
    """
    with named(name, f"the tokenizer of {what}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if chats and not tokenizer.chat_template:
        raise ValueError(
            f"target {name!r} has a tokenizer without chat template: use a model tuned for chats, "
            "or add its chat_template.jinja to the folder"
        )
    return tokenizer


@contextmanager
def named(name: str, what: str = "target") -> Iterator[None]:
    """Turn whatever a library raises over files that it cannot use into one ValueError line with
    the target's name.
    """
    try:
        yield
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = (
            "" if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__} "
        )
        raise ValueError(f"{what} {name!r} cannot be loaded: {kind}{line}") from error

"""What a training on cached states reads of its target: embedding, final norm and LM head.

A 70B target takes 4 GB then instead of 140. Weights of a layer, from which some drafters start, are
read from the files one by one. Everything that runs a layer raises `WithoutLayers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from modules.runtime.progress_bars import one_line_each
from modules.target.architecture import Architecture, is_causal
from modules.target.loading import DTYPES, causal_loader, chosen_dtype, locate, truncated_config
from modules.target.outline import check_config, named, read_tokenizer
from modules.target.target import Target
from modules.target.tokenizers.chat_template import give_arguments


class WithoutLayers(RuntimeError):
    """Something needs the layers of a target whose head alone was loaded, or its files name layers
    in another way.
    """


@dataclass(frozen=True)
class StoredLayers:
    """Weights of layers in a folder of safetensors files.

    files: by the weight's key. prefix: of all keys of layers. dtype: of what is read.
    """

    files: Mapping[str, Path]
    prefix: str
    dtype: torch.dtype

    @classmethod
    def of(cls, folder: Path, prefix: str, dtype: torch.dtype) -> StoredLayers:
        """The layers of a checkpoint. Raises WithoutLayers if it has none of these names."""
        files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        if not any(key.startswith(f"{prefix}.0.") for key in files):
            raise WithoutLayers(f"{folder} names no layers {prefix}")
        return cls(files, prefix, dtype)

    def names(self, layer: int) -> list[str]:
        """Names of the weights of a layer, without the prefix and its number."""
        start = f"{self.prefix}.{layer}."
        return [key.removeprefix(start) for key in self.files if key.startswith(start)]

    def read(self, name: str) -> Tensor:
        """One weight by its name behind the prefix (`3.mlp.up_proj.weight`); KeyError if absent."""
        key = f"{self.prefix}.{name}"
        with safe_open(self.files[key], framework="pt") as opened:
            return opened.get_tensor(key).to(self.dtype)


class HeadArchitecture(Architecture):
    """The parts of a model without layers; the layers' weights are those of its files."""

    stored: StoredLayers

    def layer_weights(self, layer: int) -> list[str]:
        """Names of the weights of one layer, without `layers.K.`."""
        return self.stored.names(layer)

    def _count(self) -> int:
        return 0

    def _first_weight(self, name: str) -> Tensor | None:
        """The first weight of the stored layers whose path ends so."""
        for layer in range(self.config.num_hidden_layers):
            for path in self.stored.names(layer):
                if path.endswith(f".{name}"):
                    return self.stored.read(f"{layer}.{path}")
        return None

    def weight(self, name: str) -> Tensor:
        """A weight by its canonical name; layers' norms are offset if the final one is."""
        module, _, rest = name.partition(".")
        if module != "layers":
            return super().weight(name)
        stored = self.stored.read(rest).to(self.embedding.get_parameter("weight").device)
        is_norm = rest.removesuffix(".weight").endswith("norm")
        return stored + 1 if is_norm and self.offset_norms else stored


class HeadTarget(Target):
    """A target that has no layers.

    Args:
        model: a causal LM of zero layers, whose config has the whole model's dimensions.
        tokenizer: of the target.
        name: of the target.
        fingerprint: of the whole target.
    """

    architecture_type: ClassVar[type[Architecture]] = HeadArchitecture

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, fingerprint: str) -> None:
        super().__init__(model, tokenizer, name)
        self._fingerprint = fingerprint

    def features(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: states come from the cache."""
        raise WithoutLayers(f"target {self.name!r} was loaded without its layers")

    def open(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: nothing is decoded."""
        raise WithoutLayers(f"target {self.name!r} was loaded without its layers")


def load_head(
    name: str,
    fingerprint: str,
    dtype: str,
    device: str,
    chat_template: Mapping[str, Any] | None = None,
) -> HeadTarget:
    """Load embedding, final norm and LM head of a target.

    Args:
        name: as for `load_target`; so are dtype, device and chat_template.
        fingerprint: of the whole target, from where its states were cached. Compare `head_digest`.

    Raises:
        ValueError: as `load_target`.
        WithoutLayers: an architecture whose layers cannot be left out.
    """
    # 1. A config of no layers.
    folder = locate(name)
    values = check_config(name, folder)
    if not is_causal(values["model_type"]):
        raise WithoutLayers(f"{values['model_type']} has an encoder")
    tokenizer = read_tokenizer(name, folder)
    give_arguments(tokenizer, chat_template or {}, name)
    with named(name):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # 2. The weights of what is left; that others are in the files is no news.
    kind, before = DTYPES[chosen_dtype(dtype, device)], logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with one_line_each(), named(name):
            model: Any = causal_loader().from_pretrained(
                folder,
                config=truncated_config(whole, 0),
                dtype=kind,
                trust_remote_code=False,
            )
    finally:
        logging.set_verbosity(before)
    # 3. The dimensions of the whole model, and where its layers are.
    model.config.num_hidden_layers = whole.num_hidden_layers
    for setting, value in vars(whole).items():
        if isinstance(value, list | tuple):
            setattr(model.config, setting, value)
    target = HeadTarget(model.to(device), tokenizer, name, fingerprint)
    stack = target.architecture.layers
    prefix = next(path for path, module in model.named_modules() if module is stack)
    with named(name):
        place = Path(str(cached_file(folder, "config.json"))).parent
    assert isinstance(target.architecture, HeadArchitecture)
    target.architecture.stored = StoredLayers.of(place, prefix, kind)
    return target

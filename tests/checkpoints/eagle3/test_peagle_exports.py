"""Exports of P-EAGLE, held against what vLLM makes of them, and imports of the same folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.formats.known import FORMATS, format_of
from checkpoints.pretrained import load_pretrained
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.peagle import PEagle
from tests.checkpoints.engines import Layer, Weights, read, rms
from tests.checkpoints.test_exports import (
    DRAFTED,
    LAYERS,
    PROMPTS,
    agrees,
    exported,
    ours,
    returns,
    shaken,
)
from tests.fakes import tiny_target

TARGET = tiny_target(layers=LAYERS)
FORMS = ("peagle", "peagle_speculators")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"layers": 3, "embeddings": "own", "norm_before_fc": True, "fused_layers": [6, 1, 4, 2]},
    {"layers": 1, "norm_before_residual": True, "qk_norm": True, "fused_layers": [5]},
]


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """vLLM's reading of its library's config: the layers' keys, and few of the others."""
    assert config["speculators_model_type"] == "peagle"
    assert config["speculators_config"]["verifier"]["name_or_path"]
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    names = ("draft_vocab_size", "norm_before_fc", "eagle_aux_hidden_state_layer_ids")
    return {
        **config["transformer_layer_config"],
        **{name: config[name] for name in names},
        "norm_before_residual": config.get("norm_before_residual", False),
        "pard_token": config["mask_token_id"],
        "architectures": ["PeagleLlamaForCausalLM"],
    }


class VllmPEagle:
    """All tokens from one pass over the text and mask slots, whose state passes fusion and norm."""

    def __init__(self, folder: Path) -> None:
        config, tensors = read(folder)
        if "speculators_model_type" in config:
            config = flattened(config)
        else:
            # Before other names vLLM writes Eagle3, and then finds no class.
            kind = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
            assert config["architectures"] == [kind[config["model_type"]]]
        size, weights = config["hidden_size"], Weights(tensors)
        self.config, self.eps = config, config["rms_norm_eps"]
        self.ids = sorted(set(config["eagle_aux_hidden_state_layer_ids"]))
        width = len(self.ids) * size
        assert config["num_aux_hidden_states"] == len(self.ids)
        assert not config.get("fc_norm") and config["hidden_act"] == "silu"
        self.embed = weights("embed_tokens.weight", config["vocab_size"], size)
        self.mask = weights("mask_hidden", 1, 1, width).view(-1)
        self.joint = weights("input_norm.weight", width) if config["norm_before_fc"] else None
        self.fc = weights("fc.weight", size, width)
        self.norms = [
            weights(f"layers.0.{n}.weight", size) for n in ("input_layernorm", "hidden_norm")
        ]
        biased = config["attention_bias"]
        self.first = Layer(weights, "layers.0", config, 2, biased)
        self.later = [
            (
                weights(f"layers.{i}.input_layernorm.weight", size),
                Layer(weights, f"layers.{i}", config, 1, biased),
            )
            for i in range(1, config["num_hidden_layers"])
        ]
        self.norm = weights("norm.weight", size)
        drafted = config["draft_vocab_size"]
        self.head, self.offset = weights("lm_head.weight", drafted, size), None
        if drafted != config["vocab_size"]:
            self.offset = weights("d2t", drafted)
            weights("t2d", config["vocab_size"])
        weights.done()

    def combined(self, joined: Tensor) -> Tensor:
        return (joined if self.joint is None else rms(joined, self.joint, self.eps)) @ self.fc.T

    def drafts(self, model: Any, ids: list[int], steps: int) -> list[int]:
        """The tokens drafted after `ids`, whose last is the newest, not yet read by the target."""
        states = model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        features = self.combined(torch.cat([states[k][0] for k in self.ids], -1))
        masks = self.combined(self.mask).expand(steps - 1, -1)
        features = torch.cat([features, masks])
        tokens = torch.tensor([*ids[1:], *[self.config["pard_token"]] * (steps - 1)])
        normed = rms(features, self.norms[1], self.eps)
        inputs = torch.cat([rms(self.embed[tokens], self.norms[0], self.eps), normed], -1)
        residual = normed if self.config["norm_before_residual"] else features
        hidden = self.first(inputs, residual)
        for gain, layer in self.later:
            hidden = layer(rms(hidden, gain, self.eps), hidden)
        logits = rms(hidden, self.norm, self.eps)[-steps:] @ self.head.T
        found = [int(row.argmax()) for row in logits]
        return found if self.offset is None else [i + int(self.offset[i]) for i in found]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
@pytest.mark.parametrize("form", FORMS)
def test_peagle_drafts_the_same_in_vllm(tmp_path, form, vocabulary, options) -> None:
    drafter = shaken(PEagle(TARGET.shape, 4, draft_vocabulary=vocabulary, **options), TARGET)
    folder = exported(drafter, TARGET, form, tmp_path)
    agrees(VllmPEagle(folder), drafter, TARGET)
    assert len({token for ids in PROMPTS for token in ours(drafter, TARGET, ids)}) > 3
    back = returns(folder, drafter, TARGET)
    for name in ("block", "layers", "embeddings", "mask_token", "norm_before_residual"):
        assert back.arguments[name] == drafter.arguments[name]


@pytest.mark.parametrize("form", FORMS)
def test_files_of_others_are_read_as_their_engine_reads_them(tmp_path, form: str) -> None:
    """Embeddings are trained unless the config says not; a norm that nothing reads is left out."""
    drafter = shaken(PEagle(TARGET.shape, 4, 2, DRAFTED, embeddings="own"), TARGET)
    folder = exported(drafter, TARGET, form, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert format_of(config) == form
    del config["embed_requires_grad"], config["norm_before_residual"]
    if form == "peagle":
        config |= {"architectures": ["PEagleDraftModel"], "ptd_token_id": config["pard_token"]}
        del config["pard_token"], config["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.hidden_norm.weight"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors")
    returns(folder, drafter, TARGET)
    del tensors["mask_hidden"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="mask_hidden is missing"):
        load_pretrained(folder, TARGET)
    top = config if form == "peagle" else config["transformer_layer_config"]
    top["fc_norm"], config["fc_norm"] = True, True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fc_norm is set, which P-EAGLE does not have here"):
        load_pretrained(folder, TARGET)


def test_formats_of_eagle_3_hold_no_peagle_and_the_other_way_round() -> None:
    assert FORMATS["speculators"].DRAFTER is Eagle3 and FORMATS["peagle"].DRAFTER is PEagle
    with pytest.raises(ValueError, match="name a state twice"):
        FORMATS["peagle"].exported(PEagle(TARGET.shape, fused_layers=[2, 2]), TARGET)

"""What serving engines make of an exported DFlash or DSpark folder, written anew from its formats.

Nothing of `modules` or `checkpoints` is used, and every tensor must be asked for.

Shape legend: N rows, R rows of a block, E head size, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.checkpoints.engines import Weights, read, rms, rotate, theta_of


class BlockEngine:
    """A block from one pass, then the likeliest token of each slot, from left to right."""

    def __init__(self, folder: Path) -> None:
        config, tensors = read(folder)
        self.read_config(config)
        layer, weights = self.layer, Weights(tensors)
        size, heads, groups = (
            layer["hidden_size"],
            layer["num_attention_heads"],
            layer["num_key_value_heads"],
        )
        each, inner = layer["head_dim"], layer["intermediate_size"]
        assert layer["model_type"] == "qwen3" and layer["hidden_act"] == "silu"
        assert not layer["attention_bias"] and "embed_tokens.weight" not in tensors
        # 1. The backbone.
        self.fc = weights("fc.weight", size, len(self.ids) * size)
        self.hidden_norm, self.norm = (
            weights(f"{name}.weight", size) for name in ("hidden_norm", "norm")
        )
        shapes = {
            "self_attn.q_proj": (heads * each, size),
            "self_attn.k_proj": (groups * each, size),
            "self_attn.v_proj": (groups * each, size),
            "self_attn.o_proj": (size, heads * each),
            "self_attn.q_norm": (each,),
            "self_attn.k_norm": (each,),
            "mlp.gate_proj": (inner, size),
            "mlp.up_proj": (inner, size),
            "mlp.down_proj": (size, inner),
            "input_layernorm": (size,),
            "post_attention_layernorm": (size,),
        }
        self.layers = [
            {name: weights(f"layers.{i}.{name}.weight", *shape) for name, shape in shapes.items()}
            for i in range(layer["num_hidden_layers"])
        ]
        # 2. The draft vocabulary and the heads.
        vocab, drafted = layer["vocab_size"], self.draft_size
        self.head = self.offset = self.markov = None
        if drafted != vocab:
            self.head = weights("lm_head.weight", drafted, size)
            self.offset = weights("d2t", drafted)
            weights("t2d", vocab)
        if self.rank:
            self.markov = (
                weights("markov_head.markov_w1.weight", vocab, self.rank),
                weights("markov_head.markov_w2.weight", drafted, self.rank),
            )
            weights("confidence_head.proj.weight", 1, size + self.rank)
            weights("confidence_head.proj.bias", 1)
        weights.done()

    def read_config(self, config: dict[str, Any]) -> None:
        """Set layer, ids (of inputs), rows, mask, shift, draft_size and rank."""
        raise NotImplementedError

    def heads(self, index: int, name: str, rows_NH: Tensor) -> Tensor:
        weights, size = self.layers[index], self.layer["head_dim"]
        made = (rows_NH @ weights[f"self_attn.{name}_proj"].T).unflatten(-1, (-1, size))
        if name == "v":
            return made
        return rms(made, weights[f"self_attn.{name}_norm"], self.layer["rms_norm_eps"])

    def run(self, index: int, hidden_RH: Tensor, context_NH: Tensor) -> Tensor:
        weights, eps = self.layers[index], self.layer["rms_norm_eps"]
        theta, start = theta_of(self.layer), len(context_NH)
        inputs = rms(hidden_RH, weights["input_layernorm"], eps)
        both = torch.cat([context_NH, inputs])
        at = torch.arange(start + len(hidden_RH))
        queries = rotate(self.heads(index, "q", inputs), at[start:], theta)
        keys = rotate(self.heads(index, "k", both), at, theta)
        repeat = queries.shape[1] // keys.shape[1]
        keys, values = (
            part.repeat_interleave(repeat, 1) for part in (keys, self.heads(index, "v", both))
        )
        scores = torch.einsum("nhe,mhe->hnm", queries, keys) / queries.shape[-1] ** 0.5
        mixed = torch.einsum("hnm,mhe->nhe", scores.softmax(-1), values).flatten(1)
        hidden = hidden_RH + mixed @ weights["self_attn.o_proj"].T
        normed = rms(hidden, weights["post_attention_layernorm"], eps)
        gated = F.silu(normed @ weights["mlp.gate_proj"].T) * (normed @ weights["mlp.up_proj"].T)
        return hidden + gated @ weights["mlp.down_proj"].T

    def drafts(self, model: Any, ids: list[int], steps: int) -> list[int]:
        """The tokens drafted after `ids`, whose last is the newest, not yet read by the target."""
        states = model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        features = torch.cat([states[k][0] for k in self.ids], -1)
        eps = self.layer["rms_norm_eps"]
        context = rms(features @ self.fc.T, self.hidden_norm, eps)
        embed = model.get_input_embeddings().weight
        hidden = embed[torch.tensor([ids[-1], *[self.mask] * (self.rows - 1)])]
        for index in range(len(self.layers)):
            hidden = self.run(index, hidden, context)
        hidden = rms(hidden, self.norm, eps)[0 if self.shift else 1 :]
        head = model.get_output_embeddings().weight if self.head is None else self.head
        drafted = [ids[-1]]
        for row in hidden[:steps]:
            logits = head @ row
            if self.markov is not None:
                logits = logits + self.markov[1] @ self.markov[0][drafted[-1]]
            token = int(logits.argmax())
            drafted.append(token if self.offset is None else token + int(self.offset[token]))
        return drafted[1:]


class FlatDFlash(BlockEngine):
    """vLLM and SGLang reading the authors' layout: ids of outputs, no heads."""

    def read_config(self, config: dict[str, Any]) -> None:
        assert config["architectures"] == ["DFlashDraftModel"]
        assert set(config["layer_types"]) == {"full_attention"}
        inner = config["dflash_config"]
        self.layer, self.rank, self.shift = config, 0, False
        self.ids = sorted(v + 1 for v in inner["target_layer_ids"])
        self.rows, self.mask = config["block_size"], inner["mask_token_id"]
        self.draft_size = config["vocab_size"]


class FlatDSpark(BlockEngine):
    """The same of DSpark, its keys at the top."""

    def read_config(self, config: dict[str, Any]) -> None:
        assert config["architectures"] == ["Qwen3DSparkModel"]
        assert config["markov_head_type"] == "vanilla" and config["confidence_head_with_markov"]
        self.layer, self.rank, self.shift = (
            config,
            config["markov_rank"],
            config["sample_from_anchor"],
        )
        self.ids = sorted(v + 1 for v in config["target_layer_ids"])
        self.rows, self.mask = config["block_size"], config["mask_token_id"]
        self.draft_size = config["draft_vocab_size"]


class Wrapped(BlockEngine):
    """vLLM reading its speculators format: ids of inputs, one flag for the mask of all layers."""

    def read_config(self, config: dict[str, Any]) -> None:
        kind = config["speculators_model_type"]
        assert config["speculators_config"]["verifier"]["name_or_path"]
        assert config["sliding_window_non_causal"] is True, "vLLM would run causal blocks"
        assert kind == "dspark" or not config["sample_from_anchor"], "an error for dflash"
        self.layer, self.shift = config["transformer_layer_config"], config["sample_from_anchor"]
        self.rank = config["markov_rank"] if kind == "dspark" else 0
        self.ids, self.mask = config["aux_hidden_state_layer_ids"], config["mask_token_id"]
        self.rows, self.draft_size = config["block_size"], config["draft_vocab_size"]

"""What serving engines make of an exported folder, written anew from their formats: names, layer
ids, offsets, norms.

Nothing of `modules` or `checkpoints` is used. Every reading is strict: a tensor that the engine
would miss, leave unused or drop silently is an error here.

Shape legend: N rows, H hidden size, V target vocabulary, D draft vocabulary, E head size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F


def read(
    folder: Path, weights: str = "model.safetensors"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / weights)


class Weights:
    """Tensors that must all be asked for, with their shapes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __call__(self, name: str, *shape: int) -> Tensor:
        tensor = self.tensors.pop(name)
        assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
        return tensor

    def done(self) -> None:
        assert not self.tensors, f"unused: {sorted(self.tensors)}"


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x_NHE: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x_NHE.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cosine, sine = angles.cos()[:, None].to(x_NHE.dtype), angles.sin()[:, None].to(x_NHE.dtype)
    first, second = x_NHE[..., :half], x_NHE[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Layer:
    """A Llama or Qwen3 decoder layer from attention inputs on; all rows so far are its cache."""

    def __init__(
        self, weights: Weights, prefix: str, config: dict[str, Any], width: int, biased: bool
    ) -> None:
        size, inner, self.size = (
            config["hidden_size"],
            config["intermediate_size"],
            config["head_dim"],
        )
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.eps, self.theta = config["rms_norm_eps"], theta_of(config)
        rows = {
            "q": self.heads * self.size,
            "k": self.groups * self.size,
            "v": self.groups * self.size,
        }
        self.project = {
            name: weights(f"{prefix}.self_attn.{name}_proj.weight", count, width * size)
            for name, count in rows.items()
        }
        self.output = weights(f"{prefix}.self_attn.o_proj.weight", size, rows["q"])
        self.biases = {
            name: weights(f"{prefix}.self_attn.{name}_proj.bias", count) if biased else None
            for name, count in {**rows, "o": size}.items()
        }
        normed = config["model_type"] == "qwen3"
        self.norms = {
            name: weights(f"{prefix}.self_attn.{name}_norm.weight", self.size)
            for name in "qk"
            if normed
        }
        slides = config.get("layer_types") == ["sliding_attention"]
        self.window = config["sliding_window"] if slides else None
        self.after = weights(f"{prefix}.post_attention_layernorm.weight", size)
        self.gate, self.up = (
            weights(f"{prefix}.mlp.{name}_proj.weight", inner, size) for name in ("gate", "up")
        )
        self.down = weights(f"{prefix}.mlp.down_proj.weight", size, inner)

    def __call__(self, inputs_NX: Tensor, residual_NH: Tensor) -> Tensor:
        count, positions = len(inputs_NX), torch.arange(len(inputs_NX))
        heads = {
            name: F.linear(inputs_NX, weight, self.biases[name]).view(count, -1, self.size)
            for name, weight in self.project.items()
        }
        for name, weight in self.norms.items():
            heads[name] = rms(heads[name], weight, self.eps)
        queries, keys = (
            rotate(heads["q"], positions, self.theta),
            rotate(heads["k"], positions, self.theta),
        )
        repeat = self.heads // self.groups
        keys, values = keys.repeat_interleave(repeat, 1), heads["v"].repeat_interleave(repeat, 1)
        scores = torch.einsum("nhe,mhe->hnm", queries, keys) / self.size**0.5
        back = positions[:, None] - positions
        scores = scores.masked_fill(back < 0, -torch.inf)
        if self.window is not None:
            scores = scores.masked_fill(back >= self.window, -torch.inf)
        mixed = torch.einsum("hnm,mhe->nhe", scores.softmax(-1), values).flatten(1)
        hidden = residual_NH + F.linear(mixed, self.output, self.biases["o"])
        normed = rms(hidden, self.after, self.eps)
        return hidden + (F.silu(normed @ self.gate.T) * (normed @ self.up.T)) @ self.down.T


def theta_of(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
    }
    assert rope["rope_type"] == "default" and not config.get("rope_scaling")
    return rope["rope_theta"]


class Eagle3Engine:
    """EAGLE-3 as vLLM or SGLang runs it: a chain of the likeliest tokens."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], target_layers: int
    ) -> None:
        """`config` flat, `tensors` with the layer under `layers.0`; subclasses read the files."""
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        weights = Weights(tensors)
        self.eps, self.config = eps, config
        self.ids = self.captured(config, target_layers)
        self.embed = weights("embed_tokens.weight", config["vocab_size"], size)
        self.fc = weights("fc.weight", size, len(self.ids) * size)
        self.fc_norm = [
            weights(f"fc_norm.{i}.weight", size)
            for i in range(len(self.ids) if config["fc_norm"] else 0)
        ]
        self.joint_norm = (
            weights("input_norm.weight", len(self.ids) * size)
            if config.get("norm_before_fc", False)
            else None
        )
        self.input_norm, self.hidden_norm = (
            weights(f"layers.0.{name}.weight", size) for name in ("input_layernorm", "hidden_norm")
        )
        self.layer = Layer(weights, "layers.0", config, 2, config["attention_bias"])
        self.norm = weights("norm.weight", size)
        self.head = weights("lm_head.weight", config["draft_vocab_size"], size)
        self.offset = (
            weights("d2t", config["draft_vocab_size"]) if "d2t" in weights.tensors else None
        )
        weights.tensors.pop("t2d", None)
        weights.done()

    def captured(self, config: dict[str, Any], target_layers: int) -> list[int]:
        raise NotImplementedError

    def drafts(self, model: Any, ids: list[int], steps: int) -> list[int]:
        """The tokens drafted after `ids`, whose last is the newest, not yet read by the target."""
        states = model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        parts = [states[k][0] for k in self.ids]
        if self.fc_norm:
            parts = [rms(part, weight, self.eps) for part, weight in zip(parts, self.fc_norm)]
        joined = torch.cat(parts, -1)
        if self.joint_norm is not None:
            joined = rms(joined, self.joint_norm, self.eps)
        features, tokens = joined @ self.fc.T, ids[1:]
        found: list[int] = []
        for _ in range(steps):
            output, carried = self.step(features, torch.tensor(tokens))
            index = int((output[-1] @ self.head.T).argmax())
            found.append(index if self.offset is None else index + int(self.offset[index]))
            features, tokens = torch.cat([features, carried[-1:]]), [*tokens, found[-1]]
        return found

    def step(self, features_NH: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        normed = rms(features_NH, self.hidden_norm, self.eps)
        residual = normed if self.config.get("norm_before_residual", False) else features_NH
        hidden = self.layer(
            torch.cat([rms(self.embed[tokens_N], self.input_norm, self.eps), normed], -1), residual
        )
        output = rms(hidden, self.norm, self.eps)
        return output, output if self.config.get("norm_output", False) else hidden


class VllmSpeculators(Eagle3Engine):
    """vLLM reading its speculators format."""

    def __init__(self, folder: Path, target_layers: int) -> None:
        config, tensors = read(folder)
        assert config["speculators_model_type"] == "eagle3"
        assert config["speculators_config"]["verifier"]["name_or_path"]
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] > 0
        layer = config["transformer_layer_config"]
        assert layer["model_type"] in ("llama", "qwen3") and layer["hidden_act"] == "silu"
        flat = {
            **layer,
            "norm_before_residual": config.get("norm_before_residual", True),
            "fc_norm": config.get("fc_norm", False),
            "norm_output": config.get("norm_output", False),
            "norm_before_fc": config.get("norm_before_fc", False),
            "draft_vocab_size": config["draft_vocab_size"],
            "ids": config["eagle_aux_hidden_state_layer_ids"],
        }
        assert ("d2t" in tensors) == (flat["draft_vocab_size"] != flat["vocab_size"]), (
            "vLLM has no place for d2t"
        )
        super().__init__(flat, tensors, target_layers)
        assert layer["num_aux_hidden_states"] == len(self.ids)

    def captured(self, config: dict[str, Any], target_layers: int) -> list[int]:
        return sorted(set(config["ids"] or (2, target_layers // 2, target_layers - 3)))


class VllmFlat(Eagle3Engine):
    """vLLM reading SGLang's layout: the ids at the top come first, `midlayer` is `layers.0`."""

    def __init__(self, folder: Path, target_layers: int) -> None:
        config, tensors = read(folder)
        assert config["architectures"][0].endswith("Eagle3")
        super().__init__(
            config,
            {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()},
            target_layers,
        )

    def captured(self, config: dict[str, Any], target_layers: int) -> list[int]:
        return sorted(set(config["eagle_aux_hidden_state_layer_ids"]))


class Sglang(Eagle3Engine):
    """SGLang: its own ids are of outputs, it needs d2t, and knows no attention bias, query norm or
    other residual.
    """

    def __init__(self, folder: Path, target_layers: int) -> None:
        config, tensors = read(folder)
        assert "d2t" in tensors and "t2d" in tensors and "target_hidden_size" not in config
        assert not config["attention_bias"] and config["model_type"] == "llama"
        config["norm_before_residual"] = False
        super().__init__(
            config,
            {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()},
            target_layers,
        )
        assert len(self.ids) > 1, "the fusion layer is called only where widths differ"

    def captured(self, config: dict[str, Any], target_layers: int) -> list[int]:
        ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        captured = sorted(v + 1 for v in ids)
        assert captured[0] > 0, "nothing is there to capture before the first layer"
        return captured


class EagleEngine:
    """EAGLE-1/2 as `engine` (`official`, `vllm` or `sglang`) runs it, drafts from the target's own
    LM head.
    """

    def __init__(self, folder: Path, engine: str) -> None:
        config, tensors = read(folder)
        weights, size = Weights(tensors), config["hidden_size"]
        has_bias = {"official": config.get("bias", True), "vllm": False, "sglang": True}[engine]
        assert not config.get("bias", False), "engines would give attention biases too"
        self.embed = weights("embed_tokens.weight", config["vocab_size"], size)
        self.fc = weights("fc.weight", size, 2 * size)
        self.bias = weights("fc.bias", size) if has_bias else torch.zeros(size, dtype=self.fc.dtype)
        self.layer = Layer(weights, "layers.0", config, 1, False)
        weights.done()

    def drafts(self, model: Any, ids: list[int], steps: int) -> list[int]:
        features = model(
            input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True
        ).hidden_states[-1][0]
        tokens, found = ids[1:], []
        for _ in range(steps):
            fused = (
                torch.cat([self.embed[torch.tensor(tokens)], features], -1) @ self.fc.T + self.bias
            )
            output = self.layer(fused, fused)
            found.append(int(model.lm_head(output[-1]).argmax()))
            features, tokens = torch.cat([features, output[-1:]]), [*tokens, found[-1]]
        return found


class MedusaEngine:
    """Medusa heads on the target's last state: each head's likeliest token."""

    blocks: list[list[tuple[Tensor, Tensor]]]
    heads: list[Tensor]
    token_map: Tensor | None = None

    def drafts(self, model: Any, ids: list[int], steps: int) -> list[int]:
        state = model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states[
            -1
        ][0, -1]
        found = []
        for layers, head in zip(self.blocks[:steps], self.heads[:steps]):
            hidden = state
            for weight, bias in layers:
                hidden = hidden + F.silu(weight @ hidden + bias)
            index = int((head @ hidden).argmax())
            found.append(index if self.token_map is None else int(self.token_map[index]))
        return found


class VllmMedusa(MedusaEngine):
    """vLLM up to 0.32: biases only with `medusa_fc_bias`, a token map only with one LM head for
    all.
    """

    def __init__(self, folder: Path) -> None:
        config, tensors = read(folder)
        assert config["model_type"] == "medusa"
        assert [k for k in config if "num" in k and "heads" in k] == ["num_heads"], (
            "vLLM takes any such key for heads"
        )
        weights, size, vocab = Weights(tensors), config["hidden_size"], config["vocab_size"]
        trimmed = config["truncated_vocab_size"] or vocab
        count, layers, biased = (
            config["num_heads"],
            config["num_hidden_layers"],
            config.get("medusa_fc_bias", False),
        )
        none = torch.zeros(size)
        self.blocks = [
            [
                (
                    weights(f"blocks.{h}.layers.{i}.weight", size, size),
                    weights(f"blocks.{h}.layers.{i}.bias", size) if biased else none,
                )
                for i in range(layers)
            ]
            for h in range(count)
        ]
        if config["original_lm_head"]:
            self.heads = [weights("lm_heads.0.weight", trimmed, size)] * count
            self.token_map = weights("token_map", trimmed) if trimmed < vocab else None
        else:
            assert trimmed == vocab, "LM heads of their own have a row for every token"
            self.heads = [weights(f"lm_heads.{h}.weight", vocab, size) for h in range(count)]
        weights.done()


class ReferenceMedusa(MedusaEngine):
    """The reference implementation's module list, loaded from its `.pt` (or from safetensors)."""

    def __init__(
        self, folder: Path, vocab: int, size: int, weights: str = "medusa_lm_head.pt"
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        file = folder / weights
        found = Weights(
            torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
        )
        layers, heads = config["medusa_num_layers"], range(config["medusa_num_heads"])
        assert layers == 1, "the reference repeats one block"
        self.blocks = [
            [(found(f"{h}.0.linear.weight", size, size), found(f"{h}.0.linear.bias", size))]
            for h in heads
        ]
        self.heads = [found(f"{h}.{layers}.weight", vocab, size) for h in heads]
        found.done()

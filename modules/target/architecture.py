"""The parts of a stock Hugging Face causal LM, and the attention masks that its layers expect.

Shape legend: B sequences, N rows of one call, S attended slots, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.target.kv_cache import SlotCache
from modules.target.stock.recurrent import Recurrence

_WINDOWS = ("sliding_attention", "chunked_attention")
"""Kinds of layers that see a part of the context alone, as the library names them."""


def is_causal(kind: Any) -> bool:
    """Whether transformers has causal language models of this `model_type`."""
    return isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def reads_images(kind: Any) -> bool:
    """Whether transformers has models of this `model_type` that need another loader because they
    read images too.
    """
    has_images = isinstance(kind, str) and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return has_images and not is_causal(kind)


class Architecture:
    """Decoder, layers, final norm, LM head and embedding of a stock causal LM, found by structure.

    `modules.target.stock.proof` shows whether what was found computes what the model computes.

    Raises:
        ValueError: a part is missing, which the message names.
    """

    _required: ClassVar[tuple[str, ...]] = (
        "hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings"
    )  # fmt: skip

    def __init__(self, model: Any) -> None:
        self.config = self._config_of(model)
        if missing := [name for name in self._required if getattr(self.config, name, None) is None]:
            raise self._without(f"{missing[0]} in its config")
        # 1. The module that holds the decoder layers, and their list.
        self.stack, self._layers_name = self._stack_of(model)
        self._all_layers = self.layers
        self.decoder: Any = self.stack
        self.norm: nn.Module | None = self._norm_of_stack()
        # 2. The library names these.
        self.embedding: nn.Module = model.get_input_embeddings()
        self.head: nn.Linear = model.get_output_embeddings()
        if self.head is None:
            raise self._without("LM head")
        # 3. What happens to logits after the head.
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(self.config)
        self.kinds = _kinds(self.config)
        # 4. Modules that keep a state.
        self.recurrence = Recurrence(self.layers)

    def _config_of(self, model: Any) -> Any:
        """The config of the language model, which another model may contain."""
        return model.config.get_text_config()

    def _stack_of(self, model: Any) -> tuple[nn.Module, str]:
        """The module that holds the decoder layers and the final norm, and its list of layers."""
        count = self._count()
        for module in model.get_decoder().modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, name
        raise self._without(f"list of {count} decoder layers")

    def _count(self) -> int:
        return self.config.num_hidden_layers

    def _norm_of_stack(self) -> nn.Module | None:
        """The final norm; None where the model has none."""
        norms = [part for part in self.stack.children() if _is_norm(part)]
        return norms[-1] if norms else None

    def _without(self, part: str) -> ValueError:
        return ValueError(
            f"target architecture {self.config.model_type!r} is not supported: no {part} was "
            "found, use a causal language model of transformers"
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return getattr(self.stack, self._layers_name)

    @layers.setter
    def layers(self, layers: nn.ModuleList) -> None:
        self.stack.register_module(self._layers_name, layers)

    @property
    def shape(self) -> TargetShape:
        """The dimensions that trained modules are built from."""
        config = self.config
        heads = config.num_attention_heads
        return TargetShape(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=_setting(config, "num_key_value_heads") or heads,
            head_dim=self._head_dim(),
            intermediate_size=_first(config, _INNER, 4 * config.hidden_size),
            norm_eps=_first(config, _EPSILONS, 1e-5),
            max_positions=config.max_position_embeddings,
            activation=_first(config, _ACTIVATIONS, "silu"),
            attention_bias=self._has_attention_bias,
            qk_norm=self._has_head_norms,
            rope=_rope(config),
        )

    def _head_dim(self) -> int:
        config = self.config
        return _setting(config, "head_dim") or config.hidden_size // config.num_attention_heads

    # Looked up once: decoding asks for the dimensions in every step.
    @cached_property
    def _has_attention_bias(self) -> bool:
        return self._first_weight("q_proj.bias") is not None

    @cached_property
    def _has_head_norms(self) -> bool:
        """Whether queries are normalised head by head."""
        weight = self._first_weight("q_norm.weight")
        return weight is not None and tuple(weight.shape) == (self._head_dim(),)

    def _first_weight(self, name: str) -> Tensor | None:
        """The first weight of all layers whose path ends so."""
        weights = self._all_layers.named_parameters()
        return next((weight for path, weight in weights if path.endswith(f".{name}")), None)

    def weight(self, name: str) -> Tensor:
        """A weight by its canonical name; KeyError if the model has no such weight.

        A norm's weight is the factor it multiplies by; Gemma stores that less one. The LM head's is
        what gives logits, with the model's scale.
        """
        if name == "embed":
            return self.embedding.get_parameter("weight")
        if name == "lm_head":
            return self.scaled(self.head.weight)
        if name == "norm" and self.norm is not None:
            return _factor(self.norm, self.norm.get_parameter("weight"))
        module, _, rest = name.partition(".")
        try:
            assert module == "layers"
            stored = self.layers.get_parameter(rest)
        except (AttributeError, AssertionError):
            raise KeyError(f"the target has no weight {name!r}") from None
        owner = self.layers.get_submodule(rest.rpartition(".")[0])
        return _factor(owner, stored) if rest.endswith(".weight") and _is_norm(owner) else stored

    @property
    def offset_norms(self) -> bool:
        """Whether its norms multiply by one plus their weight, as the final one shows."""
        stored_H = getattr(self.norm, "weight", None)
        if self.norm is None or stored_H is None:
            return False
        return not torch.equal(_factor(self.norm, stored_H), stored_H)

    def scaled(self, logits: Tensor) -> Tensor:
        """What the LM head gives, or its weights, times the model's scale of logits."""
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def layer_weights(self, layer: int) -> list[str]:
        """Names of the weights of one layer, without `layers.K.`."""
        return [name for name, _ in self.layers[layer].named_parameters()]

    @property
    def has_chunks(self) -> bool:
        """Whether some layers attend within chunks of the context alone (Llama 4)."""
        return "chunked_attention" in self.kinds

    def window(self, layer: int) -> int | None:
        """Positions that a layer reaches back; None: all of them."""
        return self.config.sliding_window if self.kinds[layer] == "sliding_attention" else None

    def mask(self, rows: Rows, cache: SlotCache | None, embeddings_BNH: Tensor) -> Any:
        """The additive mask [B,1,N,S] the layers expect (a dict per kind of layer for models that
        mix full attention with windows).
        """
        seen = _visible(rows, cache)
        masks = {"full_attention": additive(seen, embeddings_BNH.dtype)}
        if "sliding_attention" in self.kinds:
            near = _distance(rows, cache) < self.config.sliding_window
            masks["sliding_attention"] = additive(seen & near, embeddings_BNH.dtype)
        if self.has_chunks:
            inside = _chunk_apart(rows, cache, self.config.attention_chunk_size) == 0
            masks["chunked_attention"] = additive(seen & inside, embeddings_BNH.dtype)
        # One tensor where all layers that attend are of one kind.
        kinds = {kind if kind in _WINDOWS else "full_attention" for kind in self.kinds}
        if len(kinds) > 1:
            return {**dict.fromkeys(self.kinds), **masks}
        return masks[kinds.pop()]


_INNER = ("intermediate_size", "ffn_dim", "n_inner")
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")


def _first(config: Any, names: Sequence[str], otherwise: Any) -> Any:
    """The first of these settings that a config has."""
    return next((value for name in names if (value := _setting(config, name))), otherwise)


def _setting(config: Any, name: str) -> Any:
    """A setting or None; that of the last layer where layers differ (Gemma 4)."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        config = config.per_layer_config[config.num_hidden_layers - 1]
    return getattr(config, name, None)


def _logit_scale(config: Any) -> float:
    """What a model multiplies its logits by before they are capped."""
    multiplied = _first(config, ("logit_scale", "lm_head_multiplier"), 1.0)
    return multiplied / _first(config, ("logits_scaling",), 1.0)


def _kinds(config: Any) -> tuple[str, ...]:
    """The kind of each layer, as the library names it."""
    count = config.num_hidden_layers
    listed = getattr(config, "layer_types", None)
    if listed:
        return tuple(listed[:count])
    narrow = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ("sliding_attention" if narrow else "full_attention",) * count


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of rotary positions; those of full attention where kinds of layers differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        rope = rope.get("full_attention") or {}
    return dict(rope) if rope else {"rope_type": "default", "rope_theta": 10000.0}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of its input alone; those of recurrent layers have a gate too."""
    kind = type(module)
    alone = len(inspect.signature(kind.forward).parameters) == 2
    return "norm" in kind.__name__.lower() and alone


@torch.no_grad()
def _factor(norm: nn.Module, stored_H: Tensor) -> Tensor:
    """What a norm multiplies by [H]: its weight, or one plus its weight, as rows of ones and minus
    ones show.
    """
    if stored_H.is_meta:
        return stored_H
    signs_H = torch.ones_like(stored_H)
    signs_H[::2] = -1
    shown_H = (norm(signs_H) - norm(-signs_H)) / (2 * signs_H)
    plain, offset = ((shown_H - stored_H - add).abs().sum() for add in (0, 1))
    return stored_H + 1 if offset < plain else stored_H


def _visible(rows: Rows, cache: SlotCache | None) -> Tensor:
    """bool [B,N,S]: committed slots that the rows may see, then the rows since the last commit."""
    if cache is None:
        return rows.visible_BNJ
    # 1. Chosen slots, then the rows since the last commit.
    if rows.committed_BS is not None:
        usable_BS = (rows.committed_BS >= 0).expand(cache.batch_size, -1)
        seen_BNS = usable_BS[:, None].expand(-1, rows.visible_BNJ.shape[1], -1)
        return torch.cat([seen_BNS, rows.visible_BNJ.expand(cache.batch_size, -1, -1)], dim=2)
    # 2. Equal lengths: one block of committed slots.
    if cache.uniform:
        return F.pad(rows.visible_BNJ, (cache.lengths[0], 0), value=True)
    # 3. Each sequence has its rows at another slot.
    batch, count, width = rows.visible_BNJ.shape
    device = rows.visible_BNJ.device
    slots = torch.arange(cache.window(width), device=device)
    offset_BS = slots - cache.lengths_tensor(device)[:, None]
    inside = (offset_BS >= 0) & (offset_BS < width)
    index = offset_BS.clamp(0, width - 1)[:, None, :].expand(batch, count, -1)
    recent = rows.visible_BNJ.gather(2, index) & inside[:, None]
    return recent | (offset_BS < 0)[:, None]


def _distance(rows: Rows, cache: SlotCache | None) -> Tensor:
    """int64 [B,N,S]: how many positions back a slot is."""
    return rows.position_ids_BN[:, :, None] - slot_positions(rows, cache)[:, None, :]


def _chunk_apart(rows: Rows, cache: SlotCache | None, size: int) -> Tensor:
    """int64 [B,N,S]: how many chunks of positions back a slot is."""
    here, there = rows.position_ids_BN // size, slot_positions(rows, cache) // size
    return here[:, :, None] - there[:, None, :]


def slot_positions(rows: Rows, cache: SlotCache | None) -> Tensor:
    """int64 [B,S]: the position of each slot that the rows attend to."""
    here = rows.position_ids_BN
    if cache is None:
        return here
    assert cache.positions_BJ is not None
    if rows.committed_BS is not None:
        # A committed slot is its position.
        return torch.cat([rows.committed_BS.expand(cache.batch_size, -1), cache.positions_BJ], 1)
    # A committed slot is its position, recent rows have theirs.
    batch, width = cache.positions_BJ.shape
    slots = torch.arange(cache.window(width), device=here.device).expand(batch, -1).clone()
    recent = cache.lengths_tensor(here.device)[:, None] + torch.arange(width, device=here.device)
    return slots.scatter(1, recent, cache.positions_BJ)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask [B,1,N,S] of what is visible [B,N,S]."""
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)[:, None]

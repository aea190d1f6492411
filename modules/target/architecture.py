"""The parts of a stock Hugging Face causal LM, and the attention masks that its layers expect.

Shape legend: B sequences, N rows of one call, S attended slots, H hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.target.kv_cache import SlotCache

SUPPORTED = (
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "mixtral", "opt", "gpt2"
)  # fmt: skip
_MASK_BY_LAYER_TYPE = ("qwen2", "qwen3", "gemma2", "gemma3_text")
_OFFSET_NORMS = ("gemma", "gemma2", "gemma3_text")
"""Architectures whose norms multiply by one plus their weight."""
_LAYERS, _NORMS = ("layers", "h", "block"), ("norm", "ln_f", "final_layer_norm")


class Architecture:
    """Decoder, layers, final norm and LM head of a stock model. Raises ValueError for an unknown
    architecture.
    """

    supported: ClassVar[tuple[str, ...]] = SUPPORTED

    def __init__(self, model: Any) -> None:
        self.config = model.config
        if self.config.model_type not in self.supported:
            raise ValueError(
                f"target architecture {self.config.model_type!r} is not supported: use one of "
                f"{', '.join(self.supported)}"
            )
        # 1. Names differ by architecture.
        self.stack: nn.Module = self._stack_of(model)
        self.decoder: Any = self.stack
        self._layers_name = next(name for name in _LAYERS if hasattr(self.stack, name))
        norm_name = next(
            (name for name in _NORMS if getattr(self.stack, name, None) is not None), None
        )
        self.norm: nn.Module | None = getattr(self.stack, norm_name) if norm_name else None
        # 2. The library names these.
        self.embedding: nn.Module = model.get_input_embeddings()
        self.head: nn.Linear = model.get_output_embeddings()
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)

    def _stack_of(self, model: Any) -> nn.Module:
        """The module that holds the decoder layers and the final norm."""
        decoder = model.base_model
        return decoder.decoder if self.config.model_type == "opt" else decoder

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
        rope = getattr(config, "rope_parameters", None)
        return TargetShape(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=_intermediate_size(config),
            norm_eps=getattr(config, "rms_norm_eps", None)
            or getattr(config, "layer_norm_epsilon", 1e-5),
            max_positions=config.max_position_embeddings,
            activation=_activation(config),
            attention_bias=self.config.model_type == "qwen2"
            or bool(getattr(config, "attention_bias", False)),
            qk_norm=config.model_type in ("qwen3", "gemma3_text"),
            rope=dict(rope)
            if rope and "rope_theta" in rope
            else {"rope_type": "default", "rope_theta": 10000.0},
        )

    def weight(self, name: str) -> Tensor:
        """A weight by its canonical name; KeyError if the model has no such weight.

        A norm's weight is the factor it multiplies by; Gemma stores that less one.
        """
        stored, norm = self._stored(name), name.removesuffix(".weight").endswith("norm")
        return stored + 1 if norm and self.offset_norms else stored

    @property
    def offset_norms(self) -> bool:
        """Whether its norms multiply by one plus their weight."""
        return self.config.model_type in _OFFSET_NORMS

    def layer_weights(self, layer: int) -> list[str]:
        """Names of the weights of one layer, without `layers.K.`."""
        return [name for name, _ in self.layers[layer].named_parameters()]

    def _stored(self, name: str) -> Tensor:
        if name == "embed":
            return self.embedding.get_parameter("weight")
        if name == "lm_head":
            return self.head.weight
        if name == "norm":
            if self.norm is None:
                raise KeyError(name)
            return self.norm.get_parameter("weight")
        module, _, rest = name.partition(".")
        try:
            assert module == "layers"
            return self.layers.get_parameter(rest)
        except (AttributeError, AssertionError):
            raise KeyError(f"the target has no weight {name!r}") from None

    def mask(self, rows: Rows, cache: SlotCache | None, embeddings_BNH: Tensor) -> Any:
        """The additive mask [B,1,N,S] the layers expect (a dict per layer type for models that mix
        them).
        """
        # 1. The mask of full attention.
        seen = _visible(rows, cache)
        full = additive(seen, embeddings_BNH.dtype)
        # 2. The mask of sliding windows, where the model has some.
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"]
        if not window or "sliding_attention" not in kinds:
            window = None
        narrow = (
            full
            if window is None
            else additive(seen & _near(rows, cache, window), embeddings_BNH.dtype)
        )
        if self.config.model_type in _MASK_BY_LAYER_TYPE:
            return {"full_attention": full, "sliding_attention": narrow}
        return narrow


def _intermediate_size(config: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return getattr(config, name)
    return 4 * config.hidden_size


def _activation(config: Any) -> str:
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        if getattr(config, name, None):
            return getattr(config, name)
    return "silu"


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


def _near(rows: Rows, cache: SlotCache | None, window: int) -> Tensor:
    """bool [B,N,S]: slots fewer than `window` positions back."""
    slots_BS = slot_positions(rows, cache)
    return (rows.position_ids_BN[:, :, None] - slots_BS[:, None, :]) < window


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

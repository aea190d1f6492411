"""The dimensions of a target, and the names of its states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TargetShape:
    """The target's dimensions that trained modules are built from; stored in their config.json.

    `rope` holds Hugging Face's `rope_parameters`; `activation` its `hidden_act`.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float = 1e-5
    max_positions: int = 2048
    activation: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = False
    rope: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )


StateName = int | str
"""`k` (input of layer k, Hugging Face `hidden_states[k]`), `"pre_norm"` or `"final"`."""

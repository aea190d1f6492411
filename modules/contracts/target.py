"""What drafters, losses and layers may ask of the frozen target.

`modules.target.target.Target` is the implementation; contracts and layers name this protocol alone,
so that they import nothing of it.

Shape legend: B sequences, T tokens, H hidden size, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from modules.contracts.batches import StateName, TextBatch
from modules.contracts.shapes import TargetShape


class Target(Protocol):
    """A frozen causal LM: its dimensions, its weights, its hidden states."""

    name: str
    tokenizer: Any
    model: Any
    """The Hugging Face model; only adapters reach into it."""
    anatomy: Any
    """Where that model keeps its layers, norm and head."""
    cache: Any
    """The KV cache of the sequences that are open."""

    @property
    def shape(self) -> TargetShape:
        """Its dimensions."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its embedding."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        ...

    @property
    def max_positions(self) -> int:
        """The longest context, in tokens."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., H] of token ids."""
        ...

    def final_norm(self, hidden: Tensor) -> Tensor:
        """`final` states from `pre_norm` ones."""
        ...

    def logits(
        self,
        hidden: Tensor,
        vocabulary_D: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [..., V] of `final` states [..., H], or [..., D] over the given token ids."""
        ...

    def unrounded_logits(self, hidden: Tensor, vocabulary_D: Tensor | None = None) -> Tensor:
        """The same computed in float32, whatever the target's precision."""
        ...

    def lm_head_rows(self, ids: Tensor) -> Tensor:
        """LM-head weight rows [..., H] of token ids."""
        ...

    def copy_weight(self, name: str) -> Tensor:
        """A copy of one weight by its canonical name: `embed`, `lm_head`, `norm`, `layers.K.…`."""
        ...

    def layer_weights(self, layer: int) -> list[str]:
        """Names of the weights of one layer, without `layers.K.`."""
        ...

    def features(
        self, batch: TextBatch, names: Sequence[StateName], gradient: bool = False
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,T,H]}` of a packed batch."""
        ...

    def open(self, batch_size: int, capacity: int) -> None:
        """Begin new sequences with an empty KV cache of `capacity` tokens each."""
        ...

    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Append right-padded tokens: logits [B,V] of each sequence's last one, states [B,T,H]."""
        ...

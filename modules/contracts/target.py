"""What drafters, losses and layers may ask of the frozen target.

`modules.target.target.Target` is the implementation; contracts and layers name this protocol alone,
so that they do not import it.

Shape legend: B sequences, T tokens, H hidden size, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.rows import AuxiliaryRows, Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified


class Target(Protocol):
    """A frozen causal LM: its dimensions, its weights, its hidden states."""

    name: str
    tokenizer: Any
    model: Any
    """The Hugging Face model; only adapters reach into it."""
    architecture: Any
    """Where that model keeps its layers, norm and head."""

    # Dimensions and limits.

    @property
    def shape(self) -> TargetShape:
        """The dimensions of the model."""
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

    # Embeddings, logits and weights.

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

    def capped(self, logits: Tensor) -> Tensor:
        """Logits under the soft cap of the model, if it has one."""
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

    # Forward passes.

    def features(
        self,
        batch: TextBatch,
        names: Sequence[StateName],
        gradient: bool = False,
        auxiliary: AuxiliaryRows | None = None,
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,T,H]}` of a packed batch, [B,T+P,H] with auxiliary rows."""
        ...

    def forward_beside(
        self,
        hidden_BNH: Tensor,
        rows: Rows,
        names: Sequence[StateName],
        auxiliary: AuxiliaryRows,
        cache: Any = None,
    ) -> dict[StateName, Tensor]:
        """States [B,N+P,H] of one pass of rows followed by auxiliary ones."""
        ...

    def forward_rows(
        self,
        hidden_BNH: Tensor,
        rows: Rows,
        names: Sequence[StateName],
        cache: Any = None,
        layers: tuple[int, int] | None = None,
        rotary_RBN: Tensor | None = None,
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,N,H]}` of one pass of rows through all layers or a range of them."""
        ...

    def open(self, batch_size: int, capacity: int) -> Session:
        """New sequences with an empty KV cache of `capacity` tokens each."""
        ...

    # The model itself.

    @property
    def stock(self) -> Any:
        """The model as its library runs it, on the same weights."""
        ...

    @property
    def quantisation(self) -> str:
        """How its linear layers are packed: `4bit`, `8bit`, another method's name, or nothing."""
        ...

    @property
    def parameter_count(self) -> int:
        """Numbers in the model, packed ones counted one by one."""
        ...

    def fingerprint(self) -> str:
        """A digest of names, shapes and values of the weights."""
        ...

    def head_digest(self) -> str:
        """A digest of the values of embedding, final norm and LM head."""
        ...

    # Compiled calls.

    @property
    def compiled(self) -> Any:
        """The compiled calls, if there are any."""
        ...

    def compile_calls(self, autotune: bool = False) -> None:
        """Let calls over trees of one sequence go through `torch.compile` from the next `open`."""
        ...


class Session(Protocol):
    """Sequences that one target decodes together. Rows of a call are written after the
    committed ones, and `commit` keeps those that were accepted.

    cache: keys and values of all layers; only code that moves them reaches into it.
    """

    cache: Any

    @property
    def target(self) -> Target:
        """The model whose layers run."""
        ...

    @property
    def lengths_B(self) -> Tensor:
        """int64 [B]: committed tokens, of an encoder-decoder model those of its decoder."""
        ...

    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Append right-padded tokens: logits [B,V] of each sequence's last one, states [B,T,H]. Of
        an encoder-decoder model the first call is read by its encoder.
        """
        ...

    def prefill_with_images(
        self,
        ids_BT: Tensor,
        lengths_B: Tensor,
        states: Sequence[StateName],
        images: Sequence[Mapping[str, Any] | None],
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """`prefill` of an empty session with what a vision-language model's processor gives beside
        the ids of each prompt, or None.
        """
        ...

    def read(self, ids_BN: Tensor, rows: Rows) -> Tensor:
        """`final` states [B,N,H] of tokens at the positions of `rows`. Nothing is committed."""
        ...

    def run_layers(
        self,
        rows: Rows,
        hidden_BNH: Tensor,
        start: int,
        stop: int,
        states: Sequence[StateName] = ("pre_norm",),
    ) -> dict[StateName, Tensor]:
        """States [B,N,H] of a pass through the layers `start … stop-1`. Nothing is committed."""
        ...

    def verify(
        self,
        tree: TokenTree,
        states: Sequence[StateName] = (),
        vocabulary_D: Tensor | None = None,
    ) -> Verified:
        """One call over all rows of a tree: logits [B,N,V], or [B,N,D] over the given token ids,
        and states. Nothing is committed yet.
        """
        ...

    def attend_by(self, hook: Callable[..., Tensor] | None) -> None:
        """From the next call on, layers attend by `hook`
        (`modules.target.kernels.attention_hook`); None: as the model does.
        """
        ...

    def rewind(self, lengths_B: Tensor) -> None:
        """Forget committed tokens after the first `lengths_B`, and rows that are not committed."""
        ...

    def commit(self, accepted: Accepted) -> None:
        """Keep the accepted rows of the last call in the KV cache."""
        ...

    def keep(self, sequences: list[int]) -> None:
        """Keep only these sequences, which may repeat."""
        ...

    def reserve(self, width: int) -> None:
        """Make room for `width` rows after the longest sequence."""
        ...

    def select(self, sequences_S: Tensor) -> Session:
        """A session of these sequences alone (int64 [S]), without rows that are not committed."""
        ...

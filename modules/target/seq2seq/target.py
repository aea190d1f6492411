"""An encoder-decoder target: a stock T5 or BART that everything else sees as a causal LM.

Shape legend: B sequences, T tokens, P answers of a batch, N rows of one call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.rows import AuxiliaryRows, causal_rows
from modules.contracts.shapes import StateName
from modules.runtime.phase_timer import phase
from modules.target.architecture import Architecture
from modules.target.kv_cache import AppendedCache, SlotCache
from modules.target.seq2seq.architecture import Seq2SeqArchitecture
from modules.target.seq2seq.pairs import Pairs
from modules.target.seq2seq.session import Seq2SeqSession
from modules.target.target import Target


class Seq2SeqTarget(Target):
    """A frozen encoder-decoder model: its encoder reads a prompt once, its decoder gives the
    answer.

    Drafters and rules see the text of a causal LM: the prompt's tokens, then the answer's. The
    decoder's start token is in no text; its states are those of the prompt's last token, and other
    prompt tokens have states of zero. Prompt and answer together must fit `max_positions`, as for
    any other target.

    Args:
        model: a Hugging Face T5 or BART for conditional generation.
        tokenizer: its tokenizer, with a chat template that writes a prompt as the encoder reads it.
        name: what reports call it.

    Raises:
        ValueError: another architecture, no start token, or a bias of the logits, which is not
            supported.
    """

    architecture_type: ClassVar[type[Architecture]] = Seq2SeqArchitecture
    architecture: Seq2SeqArchitecture

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        super().__init__(model, tokenizer, name)
        if self.architecture.start_id is None:
            raise ValueError(
                f"target {name!r} has no decoder_start_token_id: add it to its config.json"
            )
        bias = getattr(model, "final_logits_bias", None)
        if bias is not None and bias.device.type != "meta" and bool(bias.any()):
            raise ValueError(
                f"target {name!r} adds a bias to its logits (final_logits_bias), which is not "
                "supported: use a model where it is zero"
            )

    def final_norm(self, hidden: Tensor) -> Tensor:
        """`final` states from `pre_norm` ones."""
        return super().final_norm(hidden) * self.architecture.scale

    def features(
        self,
        batch: TextBatch,
        names: Sequence[StateName],
        gradient: bool = False,
        auxiliary: AuxiliaryRows | None = None,
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,T,H]}` of a packed batch: of each answer's tokens, and of the decoder's
        start token at the token before them; zeros elsewhere.

        Raises:
            ValueError: auxiliary rows, which an encoder-decoder model has no place for in training.
        """
        if auxiliary is not None:
            raise ValueError(
                f"target {self.name!r} is an encoder-decoder model: drafters whose rows run "
                "through the target in training need a decoder-only one"
            )
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()), phase("target states"):
            return self._answer_states(batch, names)

    def _answer_states(
        self, batch: TextBatch, names: Sequence[StateName]
    ) -> dict[StateName, Tensor]:
        rows, columns = batch.input_ids.shape
        blank_XH = torch.zeros(
            rows * columns, self.shape.hidden_size, dtype=self.dtype, device=self.device
        )
        pairs = Pairs.of(batch)
        if pairs is None:
            return {name: blank_XH.view(rows, columns, -1) for name in names}
        # 1. The encoder reads all sources, the decoder a start token before each answer.
        start_P1 = torch.full_like(pairs.answers_PN[:, :1], self.architecture.start_id)
        ids_PN = torch.cat([start_P1, pairs.answers_PN], 1)
        cache = AppendedCache(self.shape.num_layers, *ids_PN.shape)
        cache.encoded = self.architecture.encode(pairs.sources_PS, pairs.source_lengths_P)
        order = causal_rows(torch.zeros_like(pairs.places_P), ids_PN.shape[1])
        states = self.forward_rows(self.embed(ids_PN), order, names, cache)
        # 2. Each row's state where its token stands in the batch.
        real_PN = torch.cat([torch.ones_like(start_P1, dtype=torch.bool), pairs.real_PN], 1)
        places_PN = pairs.places_P[:, None] - 1 + order.position_ids_BN
        return {
            name: blank_XH.index_put((places_PN[real_PN],), states[name][real_PN]).view(
                rows, columns, -1
            )
            for name in names
        }

    def open(self, batch_size: int, capacity: int) -> Seq2SeqSession:
        """New sequences with an empty KV cache of `capacity` decoder tokens each."""
        layers = self.shape.num_layers
        return Seq2SeqSession(self, SlotCache(layers, batch_size, capacity, self.layer_devices))

    def compile_calls(self, autotune: bool = False) -> None:
        """Raises ValueError: its decoder is run layer by layer."""
        raise ValueError(
            f"compile: {self.name} is an encoder-decoder model, which is not compiled: leave it out"
        )

"""The parts of a stock encoder-decoder model (T5, BART), and its decoder over rows of any tree.

Hugging Face's decoders count positions from the length of their cache, which a tree or a ragged
batch does not have. Here the stock layers run one by one, at the positions of the rows.

Shape legend: B sequences, S source tokens or attended slots, N rows of one call, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.target.architecture import Architecture, additive, slot_positions
from modules.target.kv_cache import EncodedSource, SlotCache

SEQ2SEQ = ("t5", "bart")
UNLIMITED = 512
"""The longest context of a T5 whose config names none: its positions are relative."""


class Seq2SeqArchitecture(Architecture):
    """Encoder, decoder layers, final norm and LM head of a stock encoder-decoder model.

    `decoder` runs the decoder's layers over rows, whose cache holds the encoder's output.
    """

    _required = ()

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoder: nn.Module = model.get_encoder()
        self.decoder = self.run
        self.start_id: int = self.config.decoder_start_token_id
        # 1. T5 has relative positions, all layers those of the first; BART absolute ones.
        first: Any = self.layers[0]
        self._relative: Any = (
            first.layer[0].SelfAttention if self.config.model_type == "t5" else None
        )
        # 2. What the LM head reads is scaled where it shares the embedding's weights (T5).
        scaled = getattr(self.config, "scale_decoder_outputs", False)
        self.scale: float = self.config.d_model**-0.5 if scaled else 1.0

    def _config_of(self, model: Any) -> Any:
        if model.config.model_type not in SEQ2SEQ:
            raise ValueError(
                f"target architecture {model.config.model_type!r} is not supported: use one of "
                f"{', '.join(SEQ2SEQ)}"
            )
        return model.config

    def _count(self) -> int:
        return getattr(self.config, "num_decoder_layers", None) or self.config.decoder_layers

    def _norm_of_stack(self) -> nn.Module | None:
        return getattr(self.stack, "final_layer_norm", None)

    @property
    def shape(self) -> TargetShape:
        """The dimensions of the decoder."""
        config = self.config
        if self._relative is not None:
            heads, size = config.num_heads, config.d_kv
            layers, inner = config.num_decoder_layers, config.d_ff
            positions = getattr(config, "n_positions", None) or UNLIMITED
        else:
            heads, layers = config.decoder_attention_heads, config.decoder_layers
            size, inner = config.d_model // heads, config.decoder_ffn_dim
            positions = config.max_position_embeddings
        return TargetShape(
            hidden_size=config.d_model,
            vocab_size=config.vocab_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=size,
            intermediate_size=inner,
            norm_eps=getattr(config, "layer_norm_epsilon", 1e-5),
            max_positions=positions,
            activation=getattr(config, "dense_act_fn", None) or config.activation_function,
            attention_bias=self._relative is None,
        )

    def encode(self, ids_BS: Tensor, lengths_B: Tensor) -> EncodedSource:
        """The encoder's output of right-padded sources."""
        real_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < lengths_B[:, None]
        read = self.encoder(input_ids=ids_BS, attention_mask=real_BS.long())
        states_BSH: Tensor = read.last_hidden_state
        mask_BNS = additive(real_BS[:, None], states_BSH.dtype)
        return EncodedSource(states_BSH, mask_BNS, DynamicCache())

    def mask(self, rows: Rows, cache: SlotCache | None, embeddings_BNH: Tensor) -> Any:
        """The additive mask [B,1,N,S] of the decoder's own rows, and what T5 adds for distances
        [B,heads,N,S] (else None).
        """
        mask = super().mask(rows, cache, embeddings_BNH)
        if self._relative is None:
            return mask, None
        # 1. Distances, in the buckets of a decoder: all later positions are one.
        here_BN = rows.position_ids_BN
        distance_BNS = slot_positions(rows, cache)[:, None, :] - here_BN[:, :, None]
        buckets_BNS = self._relative._relative_position_bucket(
            distance_BNS,
            bidirectional=False,
            num_buckets=self._relative.relative_attention_num_buckets,
            max_distance=self._relative.relative_attention_max_distance,
        )
        # 2. A number for each bucket and head.
        return mask, self._relative.relative_attention_bias(buckets_BNS).permute(0, 3, 1, 2)

    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: SlotCache,
        **_: Any,
    ) -> BaseModelOutput:
        """The decoder's layers over rows; what the LM head reads is `last_hidden_state` [B,N,H].

        Args:
            inputs_embeds: as `embedding` gives them, or the input of a later first layer.
            position_ids: int64 [B,N].
            attention_mask: as `mask` gives it.
            past_key_values: keys and values of earlier rows, and the encoder's output.
        """
        encoded = past_key_values.encoded
        assert encoded is not None, "the encoder has read nothing"
        # 1. The same settings for every layer.
        mask, distances = attention_mask
        options: dict[str, Any] = {} if distances is None else {"position_bias": distances}
        options |= {
            "attention_mask": mask,
            "encoder_hidden_states": encoded.states_BSH,
            "encoder_attention_mask": encoded.mask_BNS.expand(-1, -1, inputs_embeds.shape[1], -1),
            "past_key_values": EncoderDecoderCache(past_key_values, encoded.cache),
        }
        # 2. The layers; T5's return a tuple.
        hidden_BNH = self._entering(inputs_embeds, position_ids)
        for layer in self.layers:
            outputs = layer(hidden_BNH, **options)
            hidden_BNH = outputs[0] if isinstance(outputs, tuple) else outputs
        # 3. The final norm and scale, where there are any.
        if self.norm is not None:
            hidden_BNH = self.norm(hidden_BNH)
        return BaseModelOutput(last_hidden_state=hidden_BNH * self.scale)  # type: ignore[arg-type]

    def _entering(self, embeddings_BNH: Tensor, position_ids_BN: Tensor) -> Tensor:
        """The input of the first layer: BART adds absolute positions to the embeddings."""
        if self._relative is not None:
            return embeddings_BNH
        stack: Any = self.stack
        table = stack.embed_positions
        positions_BNH = F.embedding(position_ids_BN + table.offset, table.weight)
        return stack.layernorm_embedding(embeddings_BNH + positions_BNH)

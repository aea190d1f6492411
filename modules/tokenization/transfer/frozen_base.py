"""A frozen language model that is given embeddings of other tokens.

Shape legend: B rows, T tokens of a row, U tokens that have embeddings, S source width, H hidden
size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.byte_level.vocabulary import token_bytes
from modules.target.target import Target
from modules.tokenization.contract import PAD


class Base:
    """The frozen language model whose embeddings are predicted.

    source_TS: its embedding, and its LM head behind it where that is another matrix. spelled: the
    bytes of its tokens.

    Raises:
        ValueError: an LM head with a bias, logits that are capped or scaled, or an embedding that
            scales its rows.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.model = target, target.stock
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(self.model.config, key, None) not in (None, 1, 1.0):
                raise ValueError(f"target {target.name!r} has {key}: transfer does not support it")
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise ValueError(f"target {target.name!r} has an LM head with biases: not supported")
        embed = self.model.get_input_embeddings()
        self.embedding = embed.weight.detach()
        first = torch.zeros(1, dtype=torch.long, device=self.embedding.device)
        if not torch.equal(embed(first), self.embedding[first]):
            raise ValueError(f"target {target.name!r} scales its embeddings: not supported")
        head = self.model.get_output_embeddings().weight.detach()
        self.head = None if head.data_ptr() == self.embedding.data_ptr() else head
        tables = [self.embedding] if self.head is None else [self.embedding, self.head]
        self.source_TS = torch.cat(tables, 1).float()
        self.spelled = token_bytes(target.tokenizer)
        self.model.requires_grad_(False).eval()

    @property
    def tables(self) -> list[Tensor]:
        """The embedding, and the LM head where it is another matrix."""
        return [self.embedding] if self.head is None else [self.embedding, self.head]

    def losses(
        self, ids_BT: Tensor, embedding_UH: Tensor, head_UH: Tensor, bias_U: Tensor | None
    ) -> Tensor:
        """Nats [B,T-1] of every token but the first, among the U tokens that have embeddings; 0
        where the token is `PAD`.
        """
        inputs_BTH = embedding_UH[ids_BT.clamp(min=0)]
        hidden_BTH = self.model.base_model(
            inputs_embeds=inputs_BTH, attention_mask=(ids_BT != PAD).long(), use_cache=False
        ).last_hidden_state
        logits_BTU = hidden_BTH[:, :-1] @ head_UH.T
        if bias_U is not None:
            logits_BTU = logits_BTU + bias_U
        return nn.functional.cross_entropy(
            logits_BTU.flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=PAD, reduction="none"
        ).view(ids_BT[:, 1:].shape)

"""The two stages of a hypernetwork's training as Lightning modules.

Shape legend: B rows, T tokens of a row, U tokens whose embeddings a step predicts, L pieces of a
token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from modules.byte_level.vocabulary import bytes_of_characters
from modules.tokenization.contract import PAD
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, pieces_of
from modules.tokenization.transfer.sampled_tokenizers import TokenizerSampler


class Stage(LightningModule):
    """What both stages share: the hypernetwork's optimiser.

    Args:
        network: trained. base: frozen.
        lr: peak learning rate. warmup_steps: linear. steps: in all, down to 0 by a cosine.
    """

    def __init__(
        self, network: Hypernetwork, base: Base, lr: float, warmup_steps: int, steps: int
    ) -> None:
        super().__init__()
        self.network, self.base = network, base
        self.lr, self.warmup_steps, self.steps = lr, warmup_steps, steps

    def configure_optimizers(self) -> tuple[list[Optimizer], list[dict[str, Any]]]:
        """AdamW with the paper's β2 and weight decay."""
        optimizer = AdamW(self.network.parameters(), self.lr, (0.9, 0.95), weight_decay=0.01)
        schedule: LambdaLR = get_cosine_schedule_with_warmup(
            optimizer, self.warmup_steps, self.steps
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def regression(self, pieces_UL: Tensor, ids_U: Tensor) -> Tensor:
        """Mean squared error of predictions for base tokens, in dimensions of deviation 1."""
        predicted, _ = self.network.normalised(self.base.source_TS, pieces_UL)
        labels = self.network.labels([table[ids_U].float() for table in self.base.tables])
        parts = [nn.functional.mse_loss(*pair) for pair in zip(predicted, labels, strict=True)]
        return torch.stack(parts).mean()


class IdentityStage(Stage):
    """Warm-up: the base tokenizer's tokens get their own embeddings back."""

    def __init__(self, *shared: Any, tokens: int, seed: int) -> None:
        super().__init__(*shared)
        self.tokens, self.draws = tokens, torch.Generator().manual_seed(seed)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The regression of so many base tokens, drawn anew; each is one piece, itself."""
        size = len(self.base.source_TS)
        ids_U = torch.randperm(size, generator=self.draws)[: self.tokens].to(self.device)
        pieces_UL = torch.full((len(ids_U), self.network.length), PAD, device=self.device)
        pieces_UL[:, 0] = ids_U
        loss = self.regression(pieces_UL, ids_U)
        self.log("identity", loss, prog_bar=True)
        return loss


class TransferStage(Stage):
    """The frozen language model's loss on text in a tokenizer drawn at random, plus the regression
    of tokens that the base vocabulary has too.

    Args:
        shared: of `Stage`.
        sampler: of tokenizers.
        lexical: weight of the regression.
        negatives: tokens besides those of the batch that the loss chooses among.
        every: steps with one tokenizer.
        length: T.
        seed: of the negatives.
    """

    def __init__(
        self,
        *shared: Any,
        sampler: TokenizerSampler,
        lexical: float,
        negatives: int,
        every: int,
        length: int,
        seed: int,
    ) -> None:
        super().__init__(*shared)
        self.sampler, self.lexical, self.negatives = sampler, lexical, negatives
        self.every, self.length = every, length
        self.draws = torch.Generator().manual_seed(seed)
        self.tokenizer: Tokenizer | None = None
        self.pieces_VL = self.base_ids_V = torch.empty(0)

    def training_step(self, batch: Sequence[str], index: int) -> Tensor:
        """The loss of a batch of texts."""
        # 1. A tokenizer, and what its tokens are in the base vocabulary.
        if self.tokenizer is None or self.global_step % self.every == 0:
            self._draw()
        assert self.tokenizer is not None
        rows = [self.tokenizer.encode(text).ids[: self.length] for text in batch]
        # 2. Embeddings of the batch's tokens and of others.
        occurring = sorted({token for row in rows for token in row})
        others_V = torch.randperm(len(self.pieces_VL), generator=self.draws)[: self.negatives]
        tokens_U = torch.tensor([*occurring, *sorted(set(others_V.tolist()) - set(occurring))])
        places = {token: place for place, token in enumerate(occurring)}
        ids_BT = torch.full((len(rows), max([2, *map(len, rows)])), PAD)
        for line, row in zip(ids_BT, rows, strict=True):
            line[: len(row)] = torch.tensor([places[token] for token in row])
        pieces_UL, ids_BT = self.pieces_VL[tokens_U].to(self.device), ids_BT.to(self.device)
        embedding_UH, head_UH, bias_U = self.network(self.base.source_TS, pieces_UL)
        # 3. Its loss, and the regression.
        losses_BT = self.base.losses(ids_BT, embedding_UH, head_UH, bias_U)
        # Texts of one token have nothing to predict.
        modelling = losses_BT.sum() / (ids_BT[:, 1:] != PAD).sum().clamp(min=1)
        base_ids_U = self.base_ids_V[tokens_U].to(self.device)
        both = base_ids_U != PAD
        lexical = modelling.new_zeros(())
        if not self.network.residual and bool(both.any()):
            lexical = self.regression(pieces_UL[both], base_ids_U[both])
        self.log_dict({"modelling": modelling, "lexical": lexical}, prog_bar=True)
        return modelling + self.lexical * lexical

    def _draw(self) -> None:
        """Draw another tokenizer, and read its tokens."""
        self.tokenizer = self.sampler.sample()
        table = bytes_of_characters()
        spelled = [
            bytes(table[character] for character in self.tokenizer.id_to_token(i) or "")
            for i in range(self.tokenizer.get_vocab_size())
        ]
        self.pieces_VL = pieces_of(spelled, self.base.target.tokenizer, self.network.length)
        # A token of one piece is that piece.
        single_V = (self.pieces_VL != PAD).sum(1) == 1
        self.base_ids_V = torch.where(single_V, self.pieces_VL[:, 0], PAD)

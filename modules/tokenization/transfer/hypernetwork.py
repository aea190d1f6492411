"""Zero-shot tokenizer transfer: embeddings for the tokens of any tokenizer (Minixhofer et al. 2024,
arXiv 2405.07883).

Shape legend: V tokens, U of them with P pieces, L pieces of a token at most, S source width (H, or
2H where embedding and LM head differ), W width of the hypernetwork, H width of the language model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.byte_level.vocabulary import bytes_of_characters, token_bytes
from modules.runtime.files import read_object
from modules.tokenization.blocks import Blocks
from modules.tokenization.contract import PAD

FILE = "hypernetwork"
CHUNK = 4096
"""Tokens whose embeddings are predicted at a time without a gradient."""


class Rescaler(nn.Module):
    """Fixed mean and standard deviation of every dimension of a table of embeddings."""

    mean_S: Tensor
    std_S: Tensor

    def __init__(self, table_VS: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_S", table_VS.mean(0))
        self.register_buffer("std_S", table_VS.std(0).clamp(min=1e-8))

    def normalised(self, embeddings: Tensor) -> Tensor:
        """Of mean 0 and deviation 1 in every dimension."""
        return (embeddings - self.mean_S) / self.std_S

    def forward(self, normalised: Tensor) -> Tensor:
        """Of the table's mean and deviation."""
        return normalised * self.std_S + self.mean_S


class Residual(nn.Module):
    """A two-layer perceptron beside the identity, with a norm behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Same shape as the inputs."""
        return self.norm(inputs + self.block(inputs))


class Hypernetwork(nn.Module):
    """Reads the base tokenizer's pieces of a token and predicts the token's embedding, and its row
    of the LM head where that is another matrix. A prediction depends on the token's pieces alone.

    Args:
        embedding_VH: of the base model. head_VH: its LM head; None where it is the embedding.
        width: W. layers: of the transformer over pieces. heads: of its attention.
        length: L, pieces that are read of a token; further ones are left out.
        bias: also predict a number that is added to a token's logit.
        residual: predict what is added to the mean of the pieces, at first nothing. Tokens that the
            base model has keep their embeddings (the paper's network learns them).
    """

    def __init__(
        self,
        embedding_VH: Tensor,
        head_VH: Tensor | None,
        width: int,
        layers: int = 3,
        heads: int = 8,
        length: int = 7,
        bias: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.settings = {"width": width, "layers": layers, "heads": heads}
        self.settings |= {"length": length, "bias": bias, "residual": residual}
        self.residual = residual
        hidden, self.length = embedding_VH.shape[1], length
        self.tied = head_VH is None
        tables = [embedding_VH] if head_VH is None else [embedding_VH, head_VH]
        self.source = Rescaler(torch.cat(tables, 1))
        self.project = nn.Linear(hidden * len(tables), width)
        self.read = Residual(width)
        self.blocks = Blocks(width, layers, heads, length, causal=False)
        self.heads = nn.ModuleList(
            nn.Sequential(Residual(width), nn.Linear(width, hidden)) for _ in tables
        )
        self.scales = nn.ModuleList(Rescaler(table) for table in tables)
        self.bias = nn.Linear(width, 1) if bias else None
        for last in (head[-1] for head in self.heads if isinstance(head, nn.Sequential)):
            if residual and isinstance(last, nn.Linear):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def normalised(self, source_TS: Tensor, pieces_VL: Tensor) -> tuple[list[Tensor], Tensor]:
        """Predictions in the space of mean 0 and deviation 1: [V,H] for each table, and the states
        [V,W] that they are read from.

        Args:
            source_TS: embeddings (and LM head behind them) of the base vocabulary.
            pieces_VL: base ids, one or more, with `PAD` behind them.
        """
        # 1. Tokens of equally many pieces are read together: no position is padding.
        counts_V = (pieces_VL != PAD).sum(1)
        groups, states, means = [], [], []
        for count in counts_V.unique().tolist() or [1]:
            groups.append((counts_V == count).nonzero()[:, 0])
            gathered_UPS = self.source.normalised(source_TS[pieces_VL[groups[-1], :count]])
            states.append(self.blocks(self.read(self.project(gathered_UPS)))[:, 0])
            means.append(gathered_UPS.mean(1))
        # 2. In the order of the tokens.
        place_V = torch.cat(groups).argsort()
        states_VW, means_VS = (torch.cat(parts)[place_V] for parts in (states, means))
        predicted = [head(states_VW) for head in self.heads]
        if self.residual:
            # The rescaler of the source is that of each of its tables.
            parts = means_VS.chunk(len(predicted), 1)
            several_V1 = (counts_V > 1)[:, None]
            predicted = [
                torch.where(several_V1, mean + new, mean)
                for new, mean in zip(predicted, parts, strict=True)
            ]
        return predicted, states_VW

    def labels(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Rows of the model's own tables in the space of `normalised`."""
        scales = [scale for scale in self.scales if isinstance(scale, Rescaler)]
        return [scale.normalised(rows) for scale, rows in zip(scales, tables, strict=True)]

    def forward(self, source_TS: Tensor, pieces_VL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings [V,H], rows of the LM head [V,H] (the same if tied) and biases [V]."""
        predicted, states_VW = self.normalised(source_TS, pieces_VL)
        tables = [scale(part) for scale, part in zip(self.scales, predicted, strict=True)]
        bias_V = None if self.bias is None else self.bias(states_VW)[:, 0]
        return tables[0], tables[-1], bias_V

    @torch.no_grad()
    def all_of(self, source_TS: Tensor, pieces_VL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same for many tokens, some thousands at a time."""
        parts = [self(source_TS, chunk_VL) for chunk_VL in pieces_VL.split(CHUNK)]
        embeddings, rows, biases = zip(*parts, strict=True)
        bias_V = None if self.bias is None else torch.cat(biases)
        return torch.cat(embeddings), torch.cat(rows), bias_V


def save_network(network: Hypernetwork, folder: Path) -> None:
    """Write `hypernetwork.json` and `hypernetwork.safetensors`."""
    settings = network.settings
    (folder / f"{FILE}.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / f"{FILE}.safetensors", metadata={"format": "pt"})


def load_network(folder: Path, embedding_VH: Tensor, head_VH: Tensor | None) -> Hypernetwork:
    """The hypernetwork of a run for the same base model, where that is, in evaluation mode.

    Raises:
        ValueError: no such files, or of another base model.
    """
    settings = read_object(folder / f"{FILE}.json")
    try:
        network = Hypernetwork(embedding_VH, head_VH, **settings)
        network.load_state_dict(load_file(folder / f"{FILE}.safetensors"))
    except (TypeError, RuntimeError, SafetensorError, OSError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no hypernetwork of this model: {line}") from error
    return network.to(embedding_VH.device).eval()


def check_byte_level(base: Any) -> None:
    """ValueError for a tokenizer whose vocabulary does not have the bytes of plain text."""
    table = {byte: character for character, byte in bytes_of_characters().items()}
    vocabulary = base.get_vocab()
    if not all(table[ord(letter)] in vocabulary for letter in f" {ascii_letters}{digits}"):
        raise ValueError("the base model's tokenizer is no byte-level BPE: take another model")


def pieces_of(tokens: Iterable[bytes], base: Any, length: int) -> Tensor:
    """The base tokenizer's pieces [V,L] of each token, by its model alone (no pre-tokenization, no
    special tokens), padded with `PAD`.

    Args:
        tokens: bytes of each token.
        base: a fast tokenizer of byte-level BPE.
        length: L; a token's further pieces are left out. So are bytes that the base has no token
            for (SmolLM2 lacks 21); a token of nothing else is the base's end of text.

    Raises:
        ValueError: another kind of tokenizer.
    """
    check_byte_level(base)
    table = {byte: character for character, byte in bytes_of_characters().items()}
    model, rows = base.backend_tokenizer.model, []
    whole = {data: i for i, data in token_bytes(base).items()}
    for token in tokens:
        spelled = "".join(table[byte] for byte in token)
        ids = [whole[token]] if token in whole else [part.id for part in model.tokenize(spelled)]
        ids = ids or [base.eos_token_id or 0]
        rows.append([*ids[:length], *[PAD] * (length - len(ids))])
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def mean_of_pieces(table_TH: Tensor, pieces_VL: Tensor) -> Tensor:
    """The mean of the base embeddings of a token's pieces [V,H]: the usual initialisation without
    training, which the hypernetwork is compared with.
    """
    return mean_over(table_TH[pieces_VL.clamp(min=0)], pieces_VL != PAD)


def mean_over(vectors_VLH: Tensor, valid_VL: Tensor) -> Tensor:
    """The mean [V,H] of the valid vectors."""
    weights_VL = valid_VL.to(vectors_VLH)
    sums_VH = torch.einsum("vlh,vl->vh", vectors_VLH, weights_VL)
    return sums_VH / weights_VL.sum(1, keepdim=True)

"""The yardstick of the models of words: a language model of byte-level BPE.

Shape legend: B rows, T tokens, H width, V pieces and the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.tokenization.blocks import backbone
from modules.tokenization.contract import PAD, LanguageModel, Score
from modules.tokenization.units import Units
from modules.tokenization.words import unicode_words


class Subword(LanguageModel):
    """A causal transformer over pieces, with a head tied to its embedding.

    Args:
        units: pieces of a BPE; they do not cross the boundaries of `unicode_words`.
        width: H. layers: of the backbone. heads: of its attention.
        length: tokens of a training row.
    """

    def __init__(
        self, units: Units, width: int = 256, layers: int = 4, heads: int = 4, length: int = 192
    ) -> None:
        super().__init__(units)
        self.length = length
        self.embedding = nn.Embedding(units.size + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.backbone = backbone(width, layers, heads)

    def rows(self, text: str) -> list[Tensor]:
        """Rows [T,2]: the token, and the index of its word in the text; the end has one too, and
        pieces of a word that began in an earlier row have `PAD`.
        """
        words = [*map(self.units.encode, unicode_words(text)), [self.end]]
        pairs = [(token, index) for index, word in enumerate(words) for token in word]
        rows = list(torch.tensor(pairs).split(self.length))
        lasts = [int(row[-1, 1]) for row in rows]
        for row, last in zip(rows[1:], lasts):
            row[row[:, 1] == last, 1] = PAD
        return rows

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B,T,V] of the token behind each."""
        embedded = self.embedding(tokens_BT.clamp(min=0))
        states = self.backbone(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return states @ self.embedding.weight.T

    def score(self, rows: Tensor, draws: torch.Generator) -> Score:
        """Of every token in rows [B,T,2], given those before it; every row begins behind an end."""
        tokens_BT, words_BT = rows.unbind(-1)
        before_BT = nn.functional.pad(tokens_BT[:, :-1], (1, 0), value=self.end)
        logits_BTV = self.logits(before_BT)
        nll = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), tokens_BT.flatten(), ignore_index=PAD, reduction="sum"
        )
        words, right = (
            (0, 0) if self.training else self._words(logits_BTV.argmax(-1), tokens_BT, words_BT)
        )
        return Score(nll, int((tokens_BT != PAD).sum()), self.spelled(tokens_BT), words, right)

    def _words(self, likeliest_BT: Tensor, tokens_BT: Tensor, words_BT: Tensor) -> tuple[int, int]:
        """How many words were predicted whole, and how many of them rightly. A row's last word may
        go on in the next row: it does not count, and neither do the pieces there.
        """
        count = right = 0
        for likeliest, tokens, words in zip(
            likeliest_BT.tolist(), tokens_BT.tolist(), words_BT.tolist(), strict=True
        ):
            last = max(words)
            starts = [i for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
            for start, stop in zip(starts, starts[1:], strict=False):
                if words[start] in (last, PAD):
                    continue
                count += 1
                if likeliest[start:stop] == tokens[start:stop]:
                    right += self._ends(tokens[start:stop], likeliest[stop])
        return count, right

    def _ends(self, pieces: list[int], following: int) -> bool:
        """Whether the token behind a word's pieces begins another word: a mere prefix is wrong."""
        if following == self.end:
            return True
        word = self.units.decode(pieces)
        return unicode_words(word + self.units.decode([following]))[0] == word

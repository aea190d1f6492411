"""Language models that read and write whole words: the backbone runs once a word.

A small encoder pools the units of a word, a causal backbone reads the pooled words, and a small
decoder spells the next word from the backbone's states at the word before it, and from nothing
else. In training all words are spelled at once.

Shape legend: B rows, T words, C units of a word with its end, P pooled states of a word, N words of
all rows, E width of encoder and decoder, H width of the backbone, V units and the end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from modules.tokenization.blocks import Blocks, backbone
from modules.tokenization.contract import PAD, LanguageModel, Score
from modules.tokenization.units import Units
from modules.tokenization.words import capped

MOST_POSITIONS = 1 << 20


class WordModel(LanguageModel):
    """Encoder, backbone and decoder of a model of words.

    Args:
        units: that words are spelled with.
        width: H. layers: of the backbone. heads: of its attention.
        unit_width: E. unit_layers: of the encoder and of the decoder. unit_heads: of their
            attention.
        pooled: P, learned vectors in front of a word's units, whose states are what the backbone
            reads of it.
        most_bytes: of a word; longer ones are cut.
        length: words of a training row.
        learned_positions: of words, added to what the backbone reads; else rotary ones.

    Raises:
        ValueError: a width that is no multiple of its heads, or too large a count.
    """

    def __init__(
        self,
        units: Units,
        *,
        width: int,
        layers: int,
        heads: int,
        unit_width: int,
        unit_layers: int,
        unit_heads: int,
        pooled: int,
        most_bytes: int,
        length: int,
        learned_positions: bool,
    ) -> None:
        super().__init__(units)
        if max(most_bytes, length, pooled) > MOST_POSITIONS:
            raise ValueError(f"most_bytes, length and pooled are at most {MOST_POSITIONS}")
        self.pooled, self.most_bytes, self.length = pooled, most_bytes, length
        # 1. From units to a word's vectors.
        self.read_units = nn.Embedding(units.size, unit_width)
        self.pool_PE = nn.Parameter(torch.randn(pooled, unit_width) * 0.02)
        self.encoder = Blocks(unit_width, unit_layers, unit_heads, pooled + most_bytes, False)
        self.up = nn.Linear(unit_width, width, bias=False)
        # 2. Over words; one more for the empty word that every row begins with.
        self.backbone = backbone(width, layers, heads)
        self.positions_TH = (
            nn.Parameter(torch.randn(length + 1, width) * 0.02) if learned_positions else None
        )
        # 3. From a word's states to the units of the next.
        self.down = nn.Linear(width, unit_width, bias=False)
        self.write_units = nn.Embedding(units.size, unit_width)
        self.decoder = Blocks(unit_width, unit_layers, unit_heads, pooled + most_bytes, True)
        self.head = nn.Linear(unit_width, units.size + 1, bias=False)
        for table in (self.read_units, self.write_units):
            nn.init.normal_(table.weight, std=unit_width**-0.5)

    @abstractmethod
    def split(self, text: str) -> list[str]:
        """A text's words, whose concatenation it is."""

    # -- rows --------------------------------------------------------------------------------------

    def words(self, text: str) -> Iterator[list[int]]:
        """Ids of a text's words, without ends."""
        for word in self.split(text):
            for part in capped(word, self.most_bytes):
                yield self.units.encode(part)

    def rows(self, text: str) -> list[Tensor]:
        """Rows [T,C] of at most `length` words; an empty word ends the text."""
        filled = [self._filled(ids) for ids in [*self.words(text), []]]
        table_TC = torch.tensor(filled)
        return list(table_TC.split(self.length))

    def _filled(self, ids: list[int]) -> list[int]:
        return [*ids, self.end, *[PAD] * (self.most_bytes - len(ids))]

    # -- training ----------------------------------------------------------------------------------

    def score(self, rows: Tensor, draws: torch.Generator) -> Score:
        """Of every unit and end in rows [B,T,C], each word given those before it in its row."""
        empty_B1C = torch.tensor(self._filled([]), device=rows.device).expand(rows.shape[0], 1, -1)
        contexts_BTPH = self.contexts(torch.cat([empty_B1C, rows[:, :-1]], 1))
        present_BT = rows[:, :, 0] != PAD
        units_NC = rows[present_BT]
        logits_NCV = self.spell(contexts_BTPH[present_BT], units_NC)
        nll = nn.functional.cross_entropy(
            logits_NCV.flatten(0, 1), units_NC.flatten(), ignore_index=PAD, reduction="sum"
        )
        spelled_N = units_NC[:, 0] != self.end
        right_N = ((logits_NCV.argmax(-1) == units_NC) | (units_NC == PAD)).all(1)
        return Score(
            nll,
            int((units_NC != PAD).sum()),
            self.spelled(units_NC),
            int(spelled_N.sum()),
            int((right_N & spelled_N).sum()),
        )

    def contexts(self, rows: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """The backbone's states [B,T,P,H] at words [B,T,C], behind those in the cache."""
        count, length = rows.shape[:2]
        pooled_NPE = self._pool(rows.flatten(0, 1))
        words_BTPH = self.up(pooled_NPE).unflatten(0, (count, length))
        # A word's states share its position; learned positions leave none to the rotation.
        first = cache.get_seq_length() // self.pooled if cache is not None else 0
        positions_T = torch.arange(first, first + length, device=rows.device)
        if self.positions_TH is not None:
            words_BTPH = words_BTPH + self.positions_TH[positions_T, None]
            positions_T = torch.zeros_like(positions_T)
        # Without a mask, positions that do not rise by one would be taken for packed rows.
        slots = (first + length) * self.pooled
        states = self.backbone(
            inputs_embeds=words_BTPH.flatten(1, 2),
            attention_mask=torch.ones(count, slots, dtype=torch.long, device=rows.device),
            position_ids=positions_T.repeat_interleave(self.pooled).expand(count, -1),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return states.unflatten(1, (length, self.pooled))

    def _pool(self, units_NC: Tensor) -> Tensor:
        """States [N,P,E] of the vectors in front of each word, which read its units alone."""
        read_NC = units_NC[:, : self.most_bytes]
        valid_NC = (read_NC != PAD) & (read_NC != self.end)
        embedded_NCE = self.read_units(read_NC * valid_NC)
        pool_NPE = self.pool_PE.expand(len(units_NC), -1, -1)
        valid_NL = nn.functional.pad(valid_NC, (self.pooled, 0), value=True)
        states_NLE = self.encoder(torch.cat([pool_NPE, embedded_NCE], 1), valid_NL)
        return states_NLE[:, : self.pooled]

    def spell(self, contexts_NPH: Tensor, units_NC: Tensor) -> Tensor:
        """Logits [N,C,V] of each unit of a word and of its end, given those before it."""
        before_NC = units_NC[:, :-1]
        written = (before_NC != PAD) & (before_NC != self.end)
        embedded_NCE = self.write_units(before_NC * written)
        states_NLE = self.decoder(torch.cat([self.down(contexts_NPH), embedded_NCE], 1))
        return self.head(states_NLE[:, self.pooled - 1 :])

    # -- decoding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def write(
        self, prompt: str, limit: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """At most so many words that continue a prompt; an empty word ends the text. The backbone
        runs once a word.

        Raises:
            ValueError: the prompt and the answer are longer than learned positions reach.
        """
        words = [self._filled(ids) for ids in [[], *self.words(prompt)]]
        if self.positions_TH is not None and len(words) + limit > len(self.positions_TH):
            raise ValueError(
                f"limit {limit} behind {len(words) - 1} words is beyond {self.length} learned "
                "positions: lower it"
            )
        device = self.unit_bytes.device
        draws, cache = torch.Generator(device).manual_seed(seed), DynamicCache()
        rows_1TC = torch.tensor([words], device=device)
        for _ in range(limit):
            context_PH = self.contexts(rows_1TC, cache)[0, -1]
            ids = self._spelled_word(context_PH, temperature, draws)
            if not ids:
                return
            yield self.units.decode(ids)
            rows_1TC = torch.tensor([[self._filled(ids)]], device=device)

    def _spelled_word(
        self, context_PH: Tensor, temperature: float, draws: torch.Generator
    ) -> list[int]:
        ids: list[int] = []
        while len(ids) < self.most_bytes:
            units_1C = torch.tensor([[*ids, PAD]], device=context_PH.device)
            logits_V = self.spell(context_PH[None], units_1C)[0, -1]
            if temperature > 0:
                chances_V = (logits_V / temperature).softmax(-1)
                unit = int(torch.multinomial(chances_V, 1, generator=draws))
            else:
                unit = int(logits_V.argmax())
            if unit == self.end:
                break
            ids.append(unit)
        return ids

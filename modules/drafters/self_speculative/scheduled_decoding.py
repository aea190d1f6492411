"""Decoding with SkipDecode's tuned model alone, as the paper does (Del Corro et al. 2023, arXiv
2307.02628): lossy, batched, with a KV cache whose layers are of different lengths.

Shape legend: B sequences, T prompt tokens, K key/value heads, S slots, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.drafter import Drafter
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Verified
from modules.decoding.loop import Trace
from modules.drafters.self_speculative.lossy import PartialDecoder
from modules.drafters.self_speculative.skipdecode import SkipDecode
from modules.target.kv_cache import SlotCache
from modules.target.session import Session
from modules.target.target import Target


class LayerwiseCache(SlotCache):
    """A KV cache that is as long in each layer as what the layer has written.

    lengths_by_layer: slots that each layer holds, of the longest sequence.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int) -> None:
        super().__init__(num_layers, batch_size, capacity)
        self.lengths_by_layer = [0] * num_layers

    def begin(self, rows: Rows) -> None:
        """Choose the slots of the next call's rows."""
        super().begin(rows)
        self._end = self.window(rows.visible_BNJ.shape[2])

    def _buffers(self, layer: int, keys_BKND: Tensor, values_BKND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,K,S,D] of a layer, with room for the next call."""
        batch, heads, _, size = keys_BKND.shape
        if layer not in self._stores:
            self._stores[layer] = keys_BKND.new_zeros(1, 2, batch, heads, 0, size)
        room = self._stores[layer].shape[-2]
        if room < self._end:
            grown = min(self.capacity, max(self._end, 2 * room))
            self._stores[layer] = F.pad(self._stores[layer], (0, 0, 0, grown - room))
        self.lengths_by_layer[layer] = max(self.lengths_by_layer[layer], self._end)
        return self._stores[layer][0, 0], self._stores[layer][0, 1]


class ScheduledSession(Session):
    """Sequences that a tuned model decodes token by token under its schedule. All sequences of a
    batch are at one position of it.

    Args:
        model: the tuned model.
        cache: keys and values of these sequences.
        drafter: which holds the schedule.
    """

    def __init__(self, model: Any, cache: SlotCache, drafter: SkipDecode) -> None:
        super().__init__(model, cache)
        self.drafter, self.time = drafter, 0

    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Read prompts: logits [B,V] of each one's last token. No states are given."""
        assert not states, "layers that are left out have no states"
        if self.drafter.whole_prompt:
            return super().prefill(ids_BT, lengths_B)
        self.time = int(lengths_B.max())
        return self.drafter.prefill(self, ids_BT, lengths_B), {}

    @torch.no_grad()
    def verify(
        self,
        tree: TokenTree,
        states: Sequence[StateName] = (),
        vocabulary_D: Tensor | None = None,
    ) -> Verified:
        """Logits [B,1,V] after the newest token, by the layers of its position; of the ids
        `vocabulary_D` alone where they are given.
        """
        assert tree.size == 1 and not states, "one token at a time"
        rows = self._inside(tree.rows(self.lengths_B))
        final = self.drafter.scheduled_states(self, tree.tokens_BN, rows, self.time)
        self.time += 1
        return Verified(tree, self.target.logits(final, vocabulary_D))


class ScheduledDecoder(PartialDecoder):
    """Decodes with SkipDecode's model, tuned or not; nothing is verified.

    Args:
        target: the model that it was tuned from.
        drafter: the trained SkipDecode.

    Raises:
        ValueError: another kind of drafter.
    """

    name = "scheduled"

    def __init__(self, target: Target, drafter: Drafter) -> None:
        super().__init__(target, drafter)
        if not isinstance(drafter, SkipDecode):
            raise ValueError(
                f"drafter is a {type(drafter).__name__}, which has no schedule: give a run of "
                "skipdecode.yaml"
            )
        self.skipping = drafter

    def model(self) -> Any:
        """The tuned model, or the target."""
        return self.skipping.model(self.target)

    def opened(self, batch_size: int, capacity: int) -> ScheduledSession:
        """New sequences under the schedule."""
        cache = LayerwiseCache(self.target.shape.num_layers, batch_size, capacity)
        return ScheduledSession(self.model(), cache, self.skipping)

    def layers_of(self, traces: Sequence[Trace]) -> list[list[int]]:
        """The budget of each token's column; the prompt gives the first one."""
        first = 0 if self.skipping.whole_prompt else max(trace.prompt_tokens for trace in traces)
        budget = self.skipping.schedule.budget
        return [[budget(first - 1 + i) for i in range(len(trace.ids))] for trace in traces]

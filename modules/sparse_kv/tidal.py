"""TidalDecode: the slots that one layer finds serve the layers after it (Yang et al. 2024, arXiv
2410.05076).

The layers before layer s read all slots. Layer s reads all slots and chooses those of its largest
weights, which the layers after it read, until layer c reads all slots and chooses anew. Every row
chooses again. The paper's sets are per query head; a kernel that gathers a key/value head once
wants one set for its group, here by the sum of the weights.

Shape legend: B sequences, h heads with a choice of their own, N rows of one call, V vocabulary, X
chosen slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.rows import causal_rows
from modules.contracts.target import Target
from modules.sparse_kv.exact import Heads, checked_heads, weights_of
from modules.sparse_kv.policy import LayerCall, Policy, Selection, checked, top_slots
from modules.sparse_kv.session import SparseSession
from modules.target.kv_cache import SlotCache

RESELECTION_SHARE = 13 / 32
"""Depth of the re-selection layer in the released setting for Llama-3-8B, layer 13 of 32."""


@dataclass
class TidalSelection(Selection):
    """The choice of the newest selection layer."""

    budget: int
    first: int
    again: frozenset[int]
    heads: Heads
    slots: Tensor | None = None

    def choose(self, call: LayerCall) -> Tensor | None:
        """All slots in selection layers and those before them, else the chosen ones."""
        if call.layer < self.first or self.budget >= call.slots:
            return None
        if call.layer != self.first and call.layer not in self.again:
            return self.slots
        self.slots = self._top(call)
        return None

    def refresh(self, call: LayerCall) -> Tensor | None:
        """Selection layers too leave rows a choice to read."""
        self.choose(call)
        return None if call.layer < self.first or self.budget >= call.slots else self.slots

    def _top(self, call: LayerCall) -> Tensor | None:
        return top_slots(weights_of(call, self.heads), call.visible_BNS, self.budget)


class TidalDecode(Policy):
    """Position-persistent sparse attention; prompts are read in full.

    Args:
        budget: k, slots that a row reads in sparse layers.
        first: s, the selection layer, counted from 0.
        again: c, the layers that choose anew. None: one, as deep as the released layer 13 of 32;
            `reselection_scores` compares layers for a model.
        heads: which share a choice.

    Raises:
        ValueError: no budget, or layers out of order.
    """

    def __init__(
        self,
        budget: int = 256,
        first: int = 2,
        again: list[int] | None = None,
        heads: Heads = "key_value",
    ) -> None:
        checked(budget=(budget, 1), first=(first, 0))
        self.budget, self.first = budget, first
        self.heads: Heads = checked_heads(heads)
        self.again = None if again is None else sorted(again)
        if self.again and self.again[0] <= first:
            raise ValueError(f"again {self.again} must come after the selection layer {first}")

    def start(self, target: Target, batch: int) -> TidalSelection:
        """A selection for a model with so many layers.

        Raises:
            ValueError: a selection layer that the model does not have.
        """
        count = target.shape.num_layers
        middle = [max(self.first + 1, round(RESELECTION_SHARE * count))]
        again = [layer for layer in middle if layer < count] if self.again is None else self.again
        if max([self.first, *again]) >= count:
            raise ValueError(
                f"layer {max([self.first, *again])} is none of the target's {count}: lower `first` "
                "or `again`"
            )
        return TidalSelection(self.budget, self.first, frozenset(again), self.heads)


@torch.no_grad()
def reselection_scores(
    target: Target,
    texts: Sequence[tuple[list[int], list[int]]],
    policy: TidalDecode,
    layers: Sequence[int] | None = None,
) -> dict[int, tuple[float, float]]:
    """For each re-selection layer: the share of answer tokens that are the model's first choice,
    and their mean log probability, under the policy with that layer.

    The paper chooses the layer by the accuracy of needle tasks, once for a model. A prompt is read
    once; its answer is then one call for each layer, as rows choose alone.

    Args:
        target: the model.
        texts: ids of prompts and of their answers.
        policy: with budget, selection layer and heads.
        layers: to be compared; None: all after the selection layer.
    """
    count = target.shape.num_layers
    layers = range(policy.first + 1, count) if layers is None else layers
    totals, tokens = {layer: torch.zeros(2) for layer in layers}, 0
    for prompt, answer in texts:
        # 1. All tokens but the last of the prompt, in full: its answer begins after a sparse row.
        ids = torch.tensor([[*prompt, *answer]], device=target.device)
        length, width = len(prompt) - 1, len(answer)
        session = SparseSession(target, SlotCache(count, 1, length + width), policy)
        session.prefill(ids[:, :length], torch.tensor([length], device=target.device))
        rows, labels_N = causal_rows(session.lengths_B, width), ids[0, length + 1 :]
        tokens += width
        # 2. One call for each layer.
        for layer in layers:
            again = TidalDecode(policy.budget, policy.first, [layer], policy.heads)
            session.use(again.start(target, 1))
            logits = target.logits(session.read(ids[:, length:-1], rows))[0]
            log_probs = logits.float().log_softmax(-1)
            right = (log_probs.argmax(-1) == labels_N).sum()
            said = log_probs.gather(1, labels_N[:, None]).sum()
            totals[layer] += torch.stack([right.float(), said]).cpu()
    return {layer: (float(a) / tokens, float(b) / tokens) for layer, (a, b) in totals.items()}

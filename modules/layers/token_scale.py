"""The scale of token embeddings in drafters that read them beside the target's final states.

Shape legend: V target vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from modules.layers.decoder_layer import target_weight

if TYPE_CHECKING:
    from modules.contracts.target import Target

_CHUNK = 8192
"""Number of embeddings whose squares are summed at a time."""


@torch.no_grad()
def token_scale(target: Target) -> float:
    """The power of two nearest to rms(final states) / rms(input embeddings); 1 without a final
    norm.

    A linear layer over [e ; f] that starts at random, and whose weights are all trained at one
    learning rate, learns nothing from an embedding e that is a hundredth of the state f. Final
    states are h / rms(h) times the norm's gain, so their rms is that of the gain. A power of two
    multiplies exactly at every precision, and can be folded exactly into the weights that read e.
    """
    gain_H = target_weight(target, "norm")
    if gain_H is None:
        return 1.0
    # 1. rms of the input embeddings, in chunks.
    squares = torch.zeros((), dtype=torch.float64, device=target.device)
    for ids in torch.arange(target.shape.vocab_size, device=target.device).split(_CHUNK):
        squares += target.embed(ids).double().square().mean(-1).sum()
    embedding = float(squares / target.shape.vocab_size) ** 0.5
    # 2. rms of the final states, and the nearest power of two.
    state = float(gain_H.double().square().mean()) ** 0.5
    return 2.0 ** round(math.log2(state / embedding)) if state > 0 and embedding > 0 else 1.0

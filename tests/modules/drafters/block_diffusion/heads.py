"""Block drafters whose logits depend on drafted tokens, for the tests that all of them pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from modules.drafters.block_diffusion.dflash import DFlash
from modules.drafters.block_diffusion.dflash2 import DFlash2
from modules.drafters.block_diffusion.domino import Domino
from modules.drafters.block_diffusion.dspark import DSpark
from modules.drafters.block_diffusion.lilicorr import LiLiCorr
from modules.target.target import Target

Make = Callable[..., DFlash]
NARROW = {"block": 3, "rank": 6}
HEADS: dict[str, Make] = {
    "dspark": lambda shape, **more: DSpark(shape, **{**NARROW, **more}),
    "dspark_gated": lambda shape, **more: DSpark(shape, markov="gated", **{**NARROW, **more}),
    "dspark_rnn": lambda shape, **more: DSpark(shape, markov="rnn", **{**NARROW, **more}),
    "domino": lambda shape, **more: Domino(shape, **{**NARROW, "hidden": 5, **more}),
    "lilicorr": lambda shape, **more: LiLiCorr(
        shape, **{**NARROW, "candidates": 30, "lattice_size": 16, "lattice_heads": 2, **more}
    ),
    "dflash2": lambda shape, **more: DFlash2(shape, **{**NARROW, "candidates": 30, **more}),
}
"""How each is made, with blocks of three tokens."""


def shaken(drafter: DFlash, target: Target, scale: float = 0.3) -> DFlash:
    """In float64 and evaluation mode, started from the target, then moved by Gaussian noise."""
    torch.manual_seed(5)
    drafter = drafter.double()
    if drafter.vocabulary_D is not None:
        drafter.set_vocabulary(torch.randperm(target.shape.vocab_size)[: drafter.draft_size])
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.declared_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return drafter.eval()


def made(name: str, target: Target, **arguments) -> DFlash:
    """A shaken drafter of this name."""
    torch.manual_seed(4)
    return shaken(HEADS[name](target.shape, **arguments), target)

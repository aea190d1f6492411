"""DPO: direct preference optimisation of whole responses (Rafailov et al. 2023), the baseline of
the token-level ones.

Shape legend: B pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from modules.contracts.batches import PreferenceBatch
from modules.contracts.losses import Mean
from modules.contracts.shapes import TargetShape
from modules.preference.losses import dpo_loss
from modules.preference.policy import PreferenceTrainable, Response

if TYPE_CHECKING:
    from modules.contracts.target import Target


class DPO(PreferenceTrainable):
    """−log σ(β (Σ r_w − Σ r_l)) with low-rank adapters as the policy and the target as the
    reference.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        rank, alpha, dropout: of the adapters, on every linear layer.
        beta: strength of the constraint to the reference.
    """

    method: ClassVar[str] = "dpo"

    def __init__(
        self,
        shape: TargetShape,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        beta: float = 0.1,
    ) -> None:
        super().__init__(shape, rank, alpha, dropout, beta)

    def pair_losses(
        self, batch: PreferenceBatch, chosen: Response, rejected: Response, target: Target
    ) -> tuple[Tensor, dict[str, Mean]]:
        """`dpo_loss` of each pair [B], without further metrics."""
        return dpo_loss(chosen.ratio_BT, rejected.ratio_BT, self.beta), {}

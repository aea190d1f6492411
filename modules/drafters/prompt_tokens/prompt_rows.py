"""Prompt tokens as rows of a call: their positions and masks.

Shape legend: B sequences, N rows or nodes, P prompt rows, E embeddings of prompt tokens, H hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.rows import AuxiliaryRows, Rows


class HostCounts(list[int]):
    """A number for each sequence, on the host."""

    def select(self, sequences_S: Tensor) -> HostCounts:
        """The numbers of these sequences."""
        return HostCounts(self[i] for i in sequences_S.tolist())


@dataclass(frozen=True)
class PromptRows(AuxiliaryRows):
    """Prompt rows of nodes; those of a node are contiguous.

    first_BN: int64 [B,N], the first prompt row of each node.
    counts: prompt tokens of each node by sequence, on the host; empty if the host has none.
    """

    first_BN: Tensor | None = None
    counts: tuple[tuple[int, ...], ...] = ()


def prompt_rows(
    prompts_EH: Tensor, ensemble: int, rows: Rows, counts_BN: Tensor, width: int
) -> PromptRows:
    """Rows of the first `counts_BN` prompt tokens of each row.

    Prompt token i = 1 … of a row is i positions after it. Member j of its ensemble sees what
    the row sees, the row, and member j of that row's prompt tokens 1 … i. Sequences with fewer
    prompt rows are padded with rows that see only themselves.

    Args:
        prompts_EH: embeddings, those of one prompt token next to each other.
        ensemble: embeddings of a prompt token.
        rows: the rows that prompt tokens follow.
        counts_BN: int64 [B,N], prompt tokens of each row.
        width: P, as many as a sequence needs at most.
    """
    batch, count = counts_BN.shape
    entries = len(prompts_EH)
    # 1. The real rows, in the order of the rows that they follow.
    device = counts_BN.device
    wanted_BNE = torch.arange(entries, device=device) // ensemble < counts_BN[..., None]
    real_BX = wanted_BNE.flatten(1)
    order = real_BX.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    real_BP, owner_BP, entry_BP = real_BX.gather(1, order), order // entries, order % entries
    prompt_BP, member_BP = entry_BP // ensemble, entry_BP % ensemble
    # 2. They see what their row sees, and earlier prompt rows of their chain.
    index = owner_BP[..., None].expand(-1, -1, count)
    above_BPN = rows.visible_BNJ.expand(batch, -1, -1).gather(1, index) & real_BP[..., None]
    chain = owner_BP * ensemble + member_BP
    chain = torch.where(real_BP, chain, -1 - torch.arange(order.shape[1], device=device))
    same_BPP = chain[:, :, None] == chain[:, None]
    same_BPP = same_BPP & (prompt_BP[:, :, None] >= prompt_BP[:, None])
    positions_BN = rows.position_ids_BN.expand(batch, -1)
    return PromptRows(
        prompts_EH[entry_BP],
        positions_BN.gather(1, owner_BP) + 1 + prompt_BP,
        torch.cat([above_BPN, same_BPP], dim=2),
        first_BN=ensemble * (counts_BN.cumsum(1) - counts_BN),
    )

"""Inputs of Falcon's layer (Gao et al. 2025, arXiv 2412.12639): a recurrence over embeddings and
features, and within a block the newest row.

Shape legend: B sequences, N rows of one call, K rows of a block, L memories, H hidden size, X = 2H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from modules.target.kernels.cpu_kernels import narrow_linear

RECURRENT_LAYERS = 2
FEW_ROWS = 16
"""Up to so many rows are computed step by step when decoding on a CPU: the library's LSTM copies
its weights into another layout in every call.
"""


class LibraryLSTM(nn.LSTM):
    """The library's LSTM, which may run several groups of sequences inside one module call, as
    ZeRO stage 3 requires (`modules.losses.chunked.LearntHead`).
    """

    def forward(
        self,
        input: Any,
        hx: Any = None,
        parts: Callable[[Callable[..., Any], Tensor], Any] | None = None,
    ) -> Any:
        """The library's outputs and memory, or the result of `parts(lstm, input)`."""
        return super().forward(input, hx) if parts is None else parts(super().forward, input)


class Recurrence(nn.Module):
    """An LSTM over concatenated embedding and feature, whose memory is one tensor: hidden states,
    then cells.

    Args:
        size: H.
        dropout: between its layers, in training.
        unit_scale: scale each half to a root mean square of 1. A model's features may be fifty
            times the size of its embeddings, and would saturate all gates.
    """

    def __init__(self, size: int, dropout: float, unit_scale: bool) -> None:
        super().__init__()
        self.unit_scale = unit_scale
        self.lstm = LibraryLSTM(2 * size, size, RECURRENT_LAYERS, batch_first=True, dropout=dropout)

    def forward(
        self, inputs_BNX: Tensor, memory_BLH: Tensor, counts_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B,N,2H] -> [B,N,H], and the memory [B,L,H] after the first `counts_B` rows of each (all
        by default).
        """
        hidden, cell = memory_BLH.transpose(0, 1).contiguous().chunk(2)
        inputs_BNX = self._scaled(inputs_BNX)
        # Few rows without gradient on a CPU, whole sequences, or padded ones.
        alone = not (self.training or torch.is_grad_enabled()) and inputs_BNX.device.type == "cpu"
        if alone and inputs_BNX.shape[1] <= FEW_ROWS:
            with torch.autocast(inputs_BNX.device.type, enabled=False):
                return self._few(inputs_BNX, hidden, cell, counts_B)
        if counts_B is None:
            with torch.autocast(inputs_BNX.device.type, enabled=False):
                out, memory = self.lstm(inputs_BNX, (hidden, cell))
        else:
            packed = pack_padded_sequence(
                inputs_BNX, counts_B.cpu(), batch_first=True, enforce_sorted=False
            )
            packed, memory = self.lstm(packed, (hidden, cell))
            out, _ = pad_packed_sequence(packed, batch_first=True, total_length=inputs_BNX.shape[1])
        return out, torch.cat(memory).transpose(0, 1)

    def over(self, inputs_PX: Tensor, groups: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Outputs of whole documents from flat inputs [P,2H]; the memory is blank before each.

        The library's LSTM over whole sequences is four times as fast on a CPU as over packed ones
        (forward and back, four documents of 170 to 400 tokens), and faster in float32 than under
        autocast.

        Args:
            inputs_PX: of all rows.
            groups: flat positions [S,L] of documents that are read in parallel, and which of them
                are inside (bool).

        Returns:
            Outputs of all that are inside, group by group [M,H].
        """

        def read(lstm: Callable[..., Any], rows_PX: Tensor) -> Tensor:
            return torch.cat([lstm(rows_PX[index])[0][inside] for index, inside in groups])

        with torch.autocast(inputs_PX.device.type, enabled=False):
            return self.lstm(self._scaled(inputs_PX), parts=read)

    def _scaled(self, inputs_NX: Tensor) -> Tensor:
        """Each half scaled to a root mean square of 1, if `unit_scale`."""
        if not self.unit_scale:
            return inputs_NX
        halves_N2H = inputs_NX.unflatten(-1, (2, -1))
        return F.rms_norm(halves_N2H, halves_N2H.shape[-1:], eps=1e-6).flatten(-2)

    def _few(
        self, inputs_BNX: Tensor, hidden_LBH: Tensor, cell_LBH: Tensor, counts_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` for few rows on a CPU, without a gradient, step by step."""
        rows, memory, sequences_B = inputs_BNX, [], torch.arange(len(inputs_BNX))
        for weights, hidden, cell in zip(self.lstm.all_weights, hidden_LBH, cell_LBH, strict=True):
            # The input's share of the gates for all rows at once, then the recurrence row by row.
            of_input, of_hidden, bias, further = weights
            gates_BNG = narrow_linear(rows, of_input, bias + further)
            hidden_BH, cell_BH, seen = hidden, cell, []
            for row_BG in gates_BNG.unbind(1):
                enter, forget, new, leave = (row_BG + narrow_linear(hidden_BH, of_hidden)).chunk(
                    4, -1
                )
                cell_BH = forget.sigmoid() * cell_BH + enter.sigmoid() * new.tanh()
                hidden_BH = leave.sigmoid() * cell_BH.tanh()
                seen.append(torch.cat([hidden_BH, cell_BH], dim=-1))
            both = torch.stack(seen, dim=1)
            rows = both.chunk(2, -1)[0]
            after = both[:, -1] if counts_B is None else both[sequences_B, counts_B - 1]
            memory.append(after.chunk(2, -1))
        return rows, torch.stack([part[index] for index in (0, 1) for part in memory], dim=1)


class NewestRow(nn.Module):
    """Earlier rows of a block start from the newest: z_j + M_j (z_K - z_j), M_j = 1 initially.

    The next tokens depend most on the newest row, which the other rows would otherwise read through
    attention only.

    Args:
        block: K.
        size: H.
    """

    def __init__(self, block: int, size: int) -> None:
        super().__init__()
        maps = [nn.Linear(size, size, bias=False) for _ in range(block - 1)]
        for linear in maps:
            nn.init.eye_(linear.weight)
        self.maps = nn.ModuleList(maps)

    def forward(self, block_NKH: Tensor) -> Tensor:
        """Block inputs [...,K,H] -> [...,K,H]; the newest row stays as it is."""
        *early, last = block_NKH.unbind(-2)
        return torch.stack(
            [
                *(row + linear(last - row) for row, linear in zip(early, self.maps, strict=True)),
                last,
            ],
            dim=-2,
        )

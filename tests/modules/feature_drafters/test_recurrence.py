"""What Falcon's recurrence reads."""

from __future__ import annotations

import torch

from modules.feature_drafters.recurrence import RECURRENT_LAYERS, Recurrence


@torch.no_grad()
def test_it_does_not_see_the_scale_of_what_it_reads_unless_asked_to() -> None:
    torch.manual_seed(0)
    size = 16
    given, memory = torch.randn(2, 5, 2 * size).double(), torch.zeros(2, 2 * RECURRENT_LAYERS, size).double()
    scales = torch.tensor([7.0, 90.0]).repeat_interleave(size)
    scaled = Recurrence(size, 0.0, unit_scale=True).double()
    torch.testing.assert_close(scaled(given * scales, memory), scaled(given, memory), rtol=1e-5, atol=1e-5)
    papers = Recurrence(size, 0.0, unit_scale=False).double()
    assert not torch.allclose(papers(given * scales, memory)[0], papers(given, memory)[0])

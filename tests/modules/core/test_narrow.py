"""Few-row products equal the stock linear layer, whatever path they take."""

import pytest
import torch
from torch import nn

from modules.core.narrow import narrow_linear, transposed_rows, use_narrow_linears


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 12, 15, 16, 33, 64, 65])
@pytest.mark.parametrize("outputs", [6, 4096])
def test_every_path_computes_the_same(rows, outputs):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(narrow_linear(x, weight, bias), nn.functional.linear(x, weight, bias))
        torch.testing.assert_close(narrow_linear(x, weight), nn.functional.linear(x, weight))


def test_rows_are_filled_up_never_cut():
    for outputs in (6, 4096):
        for rows in range(1, 100):
            assert (transposed_rows(rows, outputs) or rows) >= rows


def test_weights_stay_where_they_are_and_gradients_flow():
    model = nn.Sequential(nn.Linear(4, 3))
    weight = model[0].weight
    use_narrow_linears(model)
    assert model[0].weight is weight
    model(torch.ones(2, 4)).sum().backward()
    assert weight.grad is not None

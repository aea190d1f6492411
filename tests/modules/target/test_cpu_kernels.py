"""The kernels for calls of few rows equal the stock layers, whatever path they take."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modules.target.kernels import cpu_kernels as narrow
from modules.target.kernels.cpu_kernels import (
    grouped_attention,
    joint_linear,
    narrow_linear,
    use_fused_norms,
    use_narrow_linears,
)
from tests import fakes


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 33, 64, 65])
@pytest.mark.parametrize("pays", [True, False])
def test_every_path_computes_the_same(rows, pays, monkeypatch):
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: pays)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 256, generator=generator)
    weight, bias = torch.randn(256, 256, generator=generator), torch.randn(256, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            narrow_linear(x, weight, bias),
            nn.functional.linear(x, weight, bias),
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(
            narrow_linear(x, weight), nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4
        )


def test_a_packed_copy_follows_its_weight(monkeypatch):
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: True)
    weight, x = nn.Parameter(torch.randn(256, 256)), torch.randn(2, 256)
    with torch.no_grad():
        narrow_linear(x, weight)
        weight.mul_(2)
        torch.testing.assert_close(narrow_linear(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_packed_copy_follows_a_cast(monkeypatch):
    """By `Module.to`, which leaves the weight's version as it is."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("no bfloat16 kernels here")
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: True)
    linear, x = nn.Linear(256, 256, bias=False), torch.randn(2, 256)
    with torch.no_grad():
        narrow_linear(x, linear.weight)
        linear.bfloat16()
        found = narrow_linear(x.bfloat16(), linear.weight)
        torch.testing.assert_close(found, x.bfloat16() @ linear.weight.T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6, 65])
def test_layers_that_read_the_same_are_one_product(dtype, rows, monkeypatch):
    """And the product follows each of the weights."""
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: True)
    block = nn.ModuleList(nn.Linear(256, size, bias=size != 192) for size in (256, 192, 320))
    block, x = block.to(dtype), torch.randn(2, rows, 256).to(dtype)
    use_narrow_linears(block)
    with torch.no_grad():
        for layer in block:
            layer.weight.mul_(2)
            found = joint_linear(x, list(block))
            for each, part in zip(block, found, strict=True):
                expected = nn.functional.linear(x, each.weight, each.bias)
                torch.testing.assert_close(part, expected, rtol=2e-2, atol=2e-2)
        packed = block[0].weight in narrow._JOINT
        assert packed == (dtype != torch.float64 and 2 * rows <= narrow.MOST_ROWS)
    assert joint_linear(x, list(block))[0].requires_grad


def test_float64_is_computed_by_the_stock_kernel(monkeypatch):
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: True)
    x, weight = torch.randn(2, 256).double(), torch.randn(256, 256).double()
    with torch.no_grad():
        assert torch.equal(narrow_linear(x, weight), nn.functional.linear(x, weight))


def test_bfloat16_weights_are_packed_too(monkeypatch):
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("no bfloat16 kernels here")
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: True)
    x, weight = torch.randn(3, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    with torch.no_grad():
        close = narrow_linear(x, weight)
    assert close.dtype == torch.bfloat16
    torch.testing.assert_close(close.float(), x.float() @ weight.float().T, rtol=2e-2, atol=0.2)


def test_autocast_brings_inputs_of_another_precision(monkeypatch):
    monkeypatch.setattr(narrow, "packing_pays", lambda *_: True)
    x, weight = torch.randn(3, 256).bfloat16(), torch.randn(256, 256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow_linear(x, weight), nn.functional.linear(x, weight))


def test_a_shape_is_measured_once_for_all_row_counts(monkeypatch):
    narrow.packed_widths.cache_clear()
    measured = []

    def minima(weights, x):
        measured.append((*weights[0].shape, len(x)))
        return (1.0, 2.0) if len(x) < 4 else (2.0, 1.0)

    monkeypatch.setattr(narrow, "_alternating_minima", minima)
    answers = [narrow.packing_pays(rows, 256, 300, torch.float32) for rows in (1, 2, 3, 4, 5, 64)]
    assert answers == [False, False, True, True, True, True]
    assert measured == [(256, 300, rows) for rows in (1, 2, 4, 8, 16, 32, 64)]
    narrow.packed_widths.cache_clear()


def test_the_measurement_runs():
    weights = [torch.randn(64, 32) for _ in range(2)]
    with torch.no_grad():
        assert all(taken > 0 for taken in narrow._alternating_minima(weights, torch.randn(2, 32)))


def test_without_memory_for_packed_copies_the_layers_stay_stock(monkeypatch, caplog):
    monkeypatch.setattr(narrow, "available_memory", lambda: 1000)
    model = nn.Sequential(nn.Linear(256, 256))
    use_narrow_linears(model)
    assert "forward" not in vars(model[0]) and "more memory than is free" in caplog.text


def test_weights_stay_where_they_are_and_gradients_flow():
    model = nn.Sequential(nn.Linear(4, 3))
    weight = model[0].weight
    use_narrow_linears(model)
    assert model[0].weight is weight
    model(torch.ones(2, 4)).sum().backward()
    assert weight.grad is not None


def test_only_norms_that_are_rms_norms_are_fused():
    llama, gemma = LlamaRMSNorm(8), GemmaRMSNorm(8)
    with torch.no_grad():
        llama.weight.copy_(torch.rand(8))
        gemma.weight.copy_(torch.rand(8))
    rows = torch.randn(2, 3, 8)
    expected = llama(rows), gemma(rows)
    use_fused_norms(nn.ModuleList([llama, gemma]))
    assert "forward" in vars(llama) and "forward" not in vars(gemma)
    with torch.no_grad():
        torch.testing.assert_close((llama(rows), gemma(rows)), expected)
    llama(rows).sum().backward()
    assert llama.weight.grad is not None


class RoundedOnce(LlamaRMSNorm):
    """As gpt-oss's: the weight is multiplied before rounding to 16 bits."""

    def forward(self, hidden_states):
        wide = hidden_states.float()
        variance = wide.pow(2).mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * normed).to(hidden_states.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_16_bits_round_where_the_stock_norm_does(dtype):
    """A norm that rounds elsewhere too, torch's own among them."""
    norms = LlamaRMSNorm(64).to(dtype), RoundedOnce(64).to(dtype), nn.RMSNorm(64, 1e-6).to(dtype)
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = [norm(rows) for norm in norms]
        assert float((expected[0] == RoundedOnce.forward(norms[0], rows)).float().mean()) < 0.95
        use_fused_norms(nn.ModuleList(norms))
        for norm, theirs in zip(norms, expected, strict=True):
            assert "forward" in vars(norm)
            assert torch.equal(norm(rows), theirs)
            # Under autocast rows have another precision than the weights.
            assert torch.equal(norm.float()(rows), type(norm).forward(norm, rows))
            assert norm.double()(rows.double()).dtype == torch.float64


@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(6, 2, 1), (4, 4, 2), (4, 1, 3)])
def test_grouped_attention_is_attention(heads, kv_heads, batch):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 5, heads, 8, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, batch, kv_heads, 9, 8, generator=generator)
    visible = torch.rand(batch, 1, 5, 9, generator=generator) > 0.3
    visible[..., 0] = True
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_the_stock_model_shares_weights_and_keeps_its_own_kernels():
    target = fakes.tiny_target()
    assert all(
        a is b for a, b in zip(target.model.parameters(), target.stock.parameters(), strict=True)
    )
    linears = [module for module in target.stock.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all("forward" not in vars(module) for module in linears)
    assert target.stock.config._attn_implementation == "sdpa"
    ids = torch.randint(target.shape.vocab_size, (1, 7))
    with torch.no_grad():
        torch.testing.assert_close(target.stock(ids).logits, target.model(ids).logits)

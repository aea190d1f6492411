"""The shared decoder layer: the library's arithmetic, and a cache that changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modules.contracts.rows import Rows, causal_rows
from modules.layers.decoder_layer import Attention, DecoderLayer, LayerCache, ResBlock
from tests.fakes import tiny_batch, tiny_target


def test_residual_block_adds_only_its_bias_at_the_start() -> None:
    block, hidden = ResBlock(8), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            block(hidden), hidden + torch.nn.functional.silu(block.linear.bias)
        )


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma"])
def test_copied_layer_computes_what_the_targets_layer_does(arch: str) -> None:
    target = tiny_target(arch)
    batch = tiny_batch(target, length=12)
    batch.document_ids.zero_()
    batch.position_ids.copy_(torch.arange(12).expand(2, -1) % 6)
    states = target.features(batch, (1, "pre_norm"))
    layer = DecoderLayer(target.shape).double()
    assert layer.copy_from(target)
    rows = batch.rows()
    near = (batch.position_ids[:, :, None] - batch.position_ids[:, None]).abs() < 6
    output = layer(states[1], Rows(rows.position_ids_BN, rows.visible_BNJ & near))
    torch.testing.assert_close(output, states["pre_norm"], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "opt"])
def test_layers_of_another_kind_are_not_copied_and_say_so(
    arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = tiny_target(arch)
    layer = DecoderLayer(target.shape).double()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert not layer.copy_from(target) and "they differ in" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_a_weight_that_the_layer_has_no_place_for_is_refused_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = tiny_target("qwen3")
    assert not DecoderLayer(replace(target.shape, qk_norm=False)).copy_from(target)
    assert "self_attn.k_norm.weight, self_attn.q_norm.weight" in caplog.text
    assert DecoderLayer(target.shape, feed_forward=False).copy_from(target), (
        "a half left out is no difference"
    )


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
def test_a_layer_without_input_norm_attends_to_final_states_as_the_targets_to_its_own(
    arch: str,
) -> None:
    """The gains of both norms differ in every channel; without folding them in, attention is
    another one.
    """
    torch.manual_seed(0)
    target = tiny_target(arch)
    normed, bare = (
        DecoderLayer(target.shape).double(),
        DecoderLayer(target.shape, input_norm=False).double(),
    )
    assert normed.copy_from(target) and bare.copy_from(target)
    hidden = torch.randn(2, 9, target.shape.hidden_size, dtype=torch.float64)
    rows = causal_rows(torch.zeros(2, dtype=torch.long), 9)
    expected = normed.self_attn(normed.input_layernorm(hidden), rows)
    torch.testing.assert_close(
        bare.self_attn(target.final_norm(hidden), rows), expected, atol=2e-5, rtol=2e-5
    )
    bare.self_attn.load_state_dict(normed.self_attn.state_dict())
    assert (
        bare.self_attn(target.final_norm(hidden), rows) - expected
    ).abs().max() > 0.1 * expected.abs().max()


def test_a_silenced_channel_of_the_final_norm_is_not_blown_up() -> None:
    target = tiny_target()
    with torch.no_grad():
        target.architecture.norm.weight[3] = 1e-6
    layer = DecoderLayer(target.shape, input_norm=False).double()
    assert layer.copy_from(target)
    columns = layer.self_attn.q_proj.weight.abs().amax(0)
    assert columns[3] == 0 and 0 < columns.max() < 20


def test_cached_rows_of_differing_counts_equal_one_pass() -> None:
    torch.manual_seed(0)
    shape = tiny_target("llama").shape
    layer = DecoderLayer(shape).double()
    hidden = torch.randn(2, 9, shape.hidden_size, dtype=torch.float64)
    start = torch.zeros(2, dtype=torch.long)
    expected = layer(hidden, causal_rows(start, 9))
    cache = LayerCache.empty(shape, start, torch.float64)
    seen = [0, 0]
    for counts in ([4, 2], [1, 3], [2, 1], [2, 3]):
        width = max(counts)
        rows = [
            torch.cat(
                [
                    hidden[b, seen[b] : seen[b] + n],
                    torch.randn(width - n, shape.hidden_size).double(),
                ]
            )
            for b, n in enumerate(counts)
        ]
        output = layer(torch.stack(rows), causal_rows(cache.lengths_B, width), cache)
        cache.keep(torch.tensor(counts))
        for b, n in enumerate(counts):
            torch.testing.assert_close(output[b, :n], expected[b, seen[b] : seen[b] + n])
            seen[b] += n
    assert seen == cache.lengths_B.tolist() == [9, 9]


def test_rows_read_the_kept_slots_that_are_chosen() -> None:
    torch.manual_seed(0)
    shape, counts = tiny_target("llama").shape, [3, 5]
    layer, start = DecoderLayer(shape).double(), torch.zeros(2, dtype=torch.long)
    cache = LayerCache.empty(shape, start, torch.float64)
    hidden = torch.randn(2, 7, shape.hidden_size, dtype=torch.float64)
    layer(hidden[:, :5], causal_rows(start, 5), cache)
    cache.keep(torch.tensor(counts))
    chosen = [[2, 0], [4]]
    rows = replace(causal_rows(cache.lengths_B, 2), committed_BS=torch.tensor([[2, 0], [4, -1]]))
    newest = torch.stack([hidden[b, count : count + 2] for b, count in enumerate(counts)])
    found = layer(newest, rows, cache)
    for b, count in enumerate(counts):
        seen = torch.ones(count + 2, count + 2, dtype=torch.bool).tril()
        seen[count:, :count] = False
        seen[count:, chosen[b]] = True
        plain = Rows(torch.arange(count + 2)[None], seen[None])
        expected = layer(hidden[b : b + 1, : count + 2], plain)[0, count:]
        torch.testing.assert_close(found[b], expected)


def test_selected_cache_goes_on_alone() -> None:
    torch.manual_seed(0)
    shape = tiny_target("llama").shape
    layer, start = DecoderLayer(shape).double(), torch.zeros(3, dtype=torch.long)
    cache = LayerCache.empty(shape, start, torch.float64)
    hidden = torch.randn(3, 5, shape.hidden_size, dtype=torch.float64)
    layer(hidden[:, :4], causal_rows(start, 4), cache)
    cache.keep(torch.tensor([4, 4, 4]))
    alone = cache.select(torch.tensor([2]))
    last = layer(hidden[2:, 4:], causal_rows(alone.lengths_B, 1), alone)
    torch.testing.assert_close(last[0, 0], layer(hidden, causal_rows(start, 5))[2, 4])


def test_widths_and_halves() -> None:
    shape = tiny_target("llama").shape
    hidden, start = torch.randn(2, 3, shape.hidden_size), torch.zeros(2, dtype=torch.long)
    rows = causal_rows(start, 3)
    wide = DecoderLayer(shape, input_norm=False, input_width=2, output_width=2)
    with torch.no_grad():
        wide.mlp.down_proj.weight.zero_()
        output = wide(torch.cat([hidden, hidden], -1), rows, residual_BNH=hidden)
    assert output.shape == (2, 3, 2 * shape.hidden_size)
    assert torch.equal(output[..., : shape.hidden_size], output[..., shape.hidden_size :])
    assert {
        name.split(".")[0] for name, _ in DecoderLayer(shape, feed_forward=False).named_parameters()
    } == {"input_layernorm", "self_attn"}
    assert {
        name.split(".")[0] for name, _ in DecoderLayer(shape, attention=False).named_parameters()
    } == {"post_attention_layernorm", "mlp"}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("count", [1, 3, 70])
def test_decoding_attends_as_training_does(arch: str, count: int) -> None:
    """Looked-up positions, and query heads as rows of their key/value head."""
    shape = tiny_target(arch).shape
    attention, generator = Attention(shape).double(), torch.Generator().manual_seed(count)
    hidden = torch.randn(2, count, shape.hidden_size, generator=generator).double()
    positions = torch.randint(0, shape.max_positions, (2, count), generator=generator)
    visible = torch.rand(2, count, count, generator=generator) < 0.4
    rows = Rows(positions, visible | torch.eye(count, dtype=torch.bool))
    assert shape.num_heads > shape.num_kv_heads
    trained = attention(hidden, rows)
    with torch.no_grad():
        decoded = attention(hidden, rows)
    assert trained.requires_grad
    torch.testing.assert_close(decoded, trained.detach(), rtol=1e-6, atol=1e-6)


def test_sequences_of_one_length_are_cached_as_ragged_ones_are() -> None:
    shape, generator = tiny_target().shape, torch.Generator().manual_seed(0)
    attention, before = Attention(shape).double(), torch.tensor([5, 5, 2])
    hidden = torch.randn(3, 5, shape.hidden_size, generator=generator).double()
    more = torch.randn(3, 4, shape.hidden_size, generator=generator).double()
    visible = torch.tensor([[True, False, True, False], [True, True, False, True]])
    found = []
    for sequences in ([0, 1, 2], [0, 1]):
        lengths_B = before[sequences]
        cache = LayerCache.empty(shape, lengths_B, torch.float64)
        with torch.no_grad():
            attention(hidden[sequences], causal_rows(cache.lengths_B, 5), cache)
            cache.keep(lengths_B, lengths_B.tolist())
            steps = []
            # The second call's rows see some of the first one's.
            for start, seen in ((0, visible[:, 2:]), (2, visible)):
                positions = lengths_B[:, None] + torch.arange(2)
                rows = Rows(positions, seen.expand(len(sequences), -1, -1))
                steps.append(attention(more[sequences, start : start + 2], rows, cache))
        assert cache.uniform == (len(sequences) == 2)
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(found[0][:2], found[1])

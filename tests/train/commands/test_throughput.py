"""The throughput command: the product's own loss is what is timed, and unequal work is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.command_line.loading import run as one_line_run
from modules.contracts.shapes import TargetShape
from modules.layers.decoder_layer import DecoderLayer
from modules.layers.hanging_attention import hanging_attention
from tests.fakes import tiny_target
from train import throughput
from train.throughput import (
    Comparison,
    alternating_seconds,
    command,
    our_drafter,
    our_step,
    packed_row,
    their_drafter,
    their_step,
)


def test_the_step_is_the_drafters_loss_forward_and_backward() -> None:
    asked, target = (
        Comparison(tokens=24, vocabulary=40, assistant=0.5),
        tiny_target(dtype=torch.float32),
    )
    drafter = our_drafter(asked, target).train()
    batch = packed_row(asked, target, drafter.training_states)
    assert batch.loss_mask.sum() == 12 and int(batch.input_ids.max()) < 40
    expected = drafter.loss(batch, target, 0.5).total
    torch.testing.assert_close(our_step(drafter, batch, target, "float32")(), expected.detach())
    assert all(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in drafter.declared_parameters()
    )


class Theirs(nn.Module):
    """A stand-in for SpecForge's drafter: its names, its calls, and the same sums over every
    position of the row.
    """

    def __init__(self, config: Any, attention_backend: str) -> None:
        super().__init__()
        size = config.hidden_size
        shape = TargetShape(
            size,
            config.vocab_size,
            2,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_norm_eps,
            config.max_position_embeddings,
            rope=dict(config.rope_parameters),
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.midlayer = DecoderLayer(shape, input_norm=False, input_width=2)
        self.midlayer.input_layernorm, self.midlayer.hidden_norm = (
            nn.RMSNorm(size, shape.norm_eps) for _ in range(2)
        )
        self.fc, self.norm = nn.Linear(3 * size, size, bias=False), nn.RMSNorm(size, shape.norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.register_buffer("t2d", torch.zeros(config.vocab_size))

    def project_hidden_states(self, states: Tensor) -> Tensor:
        return self.fc(states)

    def embed_input_ids(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))

    def backbone(
        self,
        embedded: Tensor,
        hidden: Tensor,
        cache: list[list[Tensor]],
        mask: Tensor,
        positions: Tensor,
    ) -> Tensor:
        layer: Any = self.midlayer
        step = len(cache[0])
        inputs = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], dim=-1)
        queries, keys, values = (
            part[0] for part in layer.self_attn.project(inputs, positions + step)
        )
        cache[0].append(keys), cache[1].append(values)
        mixed = hanging_attention(
            queries, cache[0][0], cache[1][0], mask, cache[0][1:], cache[1][1:]
        )
        return layer.after_attention(hidden + layer.self_attn.o_proj(mixed.flatten(1))[None])


def test_both_drafters_do_the_same_work_and_a_wrong_shift_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = SimpleNamespace(
        LlamaForCausalLMEagle3=Theirs,
        prepare_decoder_attention_mask=lambda mask, shape, like, past: torch.ones(
            shape[1], shape[1], dtype=torch.bool
        ).tril(),
    )
    monkeypatch.setattr(throughput.importlib, "import_module", lambda name: fake)
    asked, target = Comparison(tokens=24, vocabulary=40), tiny_target(layers=8, dtype=torch.float32)
    ours = our_drafter(asked, target).train()
    batch = packed_row(asked, target, ours.training_states)
    theirs: Any = their_drafter(ours, target).train()
    expected = our_step(ours, batch, target, "float32")()
    torch.testing.assert_close(
        their_step(theirs, batch, target, ours, "float32")(), expected, rtol=1e-4, atol=1e-4
    )
    own = dict(ours.named_parameters())
    torch.testing.assert_close(
        theirs.midlayer.self_attn.q_proj.weight.grad,
        own["layer.self_attn.q_proj.weight"].grad,
        rtol=1e-3,
        atol=1e-5,
    )
    assert theirs.embed_tokens.weight.grad is None
    shifted = throughput._shifted
    monkeypatch.setattr(throughput, "_shifted", lambda rows, places: shifted(rows, places + 1))
    with pytest.raises(ValueError, match="do not do the same work"):
        throughput._same(
            float(expected), float(their_step(theirs, batch, target, ours, "float32")()), 0.001
        )


def test_passes_alternate_and_the_first_of_each_is_not_counted() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) or torch.zeros(()) for name in ("a", "b")}
    taken = alternating_seconds(steps, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3 and {name: len(seconds) for name, seconds in taken.items()} == {
        "a": 2,
        "b": 2,
    }


def test_the_command_prints_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "load_target", lambda *_: tiny_target(dtype=torch.float32))
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    assert (
        command(
            ["--tokens", "24", "--vocabulary", "40", "--repeats", "1", "--precision", "bfloat16"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("EAGLE-3, forward and backward, 3 steps, 24 tokens")
        and "bfloat16" in lines[0]
    )
    assert len(lines) == 2 and lines[1].startswith("slipstream") and "tokens/s" in lines[1]
    assert one_line_run(command, ["--precision", "int3"]) == 2


def test_two_drafters_that_do_not_do_the_same_work_are_refused() -> None:
    throughput._same(8.0, 8.1)
    with pytest.raises(ValueError, match="do not do the same work"):
        throughput._same(8.0, 9.0)

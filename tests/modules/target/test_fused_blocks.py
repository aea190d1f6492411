"""Fused blocks of stock layers compute what the library's do, in every kind of call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.kernels import compiled_calls, cpu_kernels, fused_blocks
from modules.target.kernels.attention_hook import AttentionHook, LayerAttention
from modules.target.target import Target
from tests.fakes import tiny_target

LENGTHS, PARENTS = [7, 3], [[-1, 0, 0, 1], [-1, 0, 1, 3]]


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers are packed too."""
    monkeypatch.setattr(cpu_kernels, "SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(cpu_kernels, "packing_pays", lambda *_: True)


def fused(target: Target) -> list[Any]:
    """Its modules with a fused form."""
    forms = (fused_blocks.attention, fused_blocks.feed_forward)
    modules: list[Any] = [*target.model.modules()]
    return [each for each in modules if getattr(vars(each).get("forward"), "func", 0) in forms]


@contextmanager
def stock_blocks(target: Target) -> Iterator[None]:
    """The library's blocks while the block lasts."""
    forms = {module: module.forward for module in fused(target)}
    for module in forms:
        del module.forward
    yield
    for module, form in forms.items():
        module.forward = form


def calls(target: Target, hook: AttentionHook | None = None) -> list[torch.Tensor]:
    """Logits of calls over trees and of one row, behind a ragged batch and one sequence."""
    found = []
    for lengths in (LENGTHS, LENGTHS[:1]):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(target.shape.vocab_size, (len(lengths), 7), generator=generator)
        session = target.open(len(lengths), 20)
        session.attend_by(hook)
        session.prefill(ids, torch.tensor(lengths))
        tree = TokenTree(ids[:, :4], Topology(torch.tensor(PARENTS[: len(lengths)])))
        found += [
            session.verify(tree).logits_BNV,
            session.verify(TokenTree.root(ids[:, 0])).logits_BNV,
        ]
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma", "gemma2"])
def test_calls_are_those_of_the_library(arch: str) -> None:
    target = tiny_target(arch, torch.float32)
    rotated = arch in fused_blocks.ATTENTIONS
    assert len(fused(target)) == (4 if rotated else 2)
    found = calls(target)
    with stock_blocks(target):
        expected = calls(target)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    decoder = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    ours = decoder.decode([[5, 6, 7], [9]], Sampling(), 12)
    with stock_blocks(target):
        theirs = decoder.decode([[5, 6, 7], [9]], Sampling(), 12)
    assert [trace.ids for trace in ours] == [trace.ids for trace in theirs]


def test_queries_keys_and_values_are_one_product_without_gradients_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, made = tiny_target("llama", torch.float32), []
    product = cpu_kernels.packed_joint

    def counted(x: torch.Tensor, linears: Any) -> torch.Tensor:
        made.append(len(linears))
        return product(x, linears)

    monkeypatch.setattr(cpu_kernels, "packed_joint", counted)
    session = target.open(1, 9)
    session.prefill(torch.tensor([[3, 4, 5]]), torch.tensor([3]))
    assert made == [3, 2, 3, 2]
    monkeypatch.setattr(fused_blocks, "joint_linear", None)
    embeddings = target.embed(torch.tensor([[3, 4, 5]])).requires_grad_()
    rows = TokenTree.chain(torch.tensor([[3, 4, 5]])).rows(torch.tensor([0]))
    target.forward_rows(embeddings, rows, ("final",))["final"].sum().backward()
    assert len(made) == 4 and embeddings.grad is not None


def test_weights_in_shards_are_read_by_their_own_layers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed numbers the modules whose weights it gathers; else a validation between two steps
    ends the training."""
    target, read = tiny_target("llama", torch.float32), []
    monkeypatch.setattr(cpu_kernels, "packed_joint", None)
    for number, (name, module) in enumerate(target.model.named_modules()):
        vars(module)["ds_id"] = number
        if ".layers.0." in name and name.endswith("_proj"):
            module.register_forward_pre_hook(lambda *inputs: read.append(inputs))
    target.open(1, 9).prefill(torch.tensor([[3, 4, 5]]), torch.tensor([3]))
    assert len(read) == 7


def test_a_session_with_another_attention_has_it_in_every_layer() -> None:
    target, seen = tiny_target("llama", torch.float32), []
    expected = calls(target)

    def hook(call: LayerAttention) -> torch.Tensor:
        seen.append(call.layer)
        return call.stock()

    found = calls(target, hook)
    assert seen == [0, 1] * 6
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_compiled_calls_go_through_the_library(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_calls, "BACKEND", "eager")
    answers = []
    for compiled in (False, True):
        target = tiny_target(arch, torch.float32)
        if compiled:
            target.compile_calls()
            monkeypatch.setattr(cpu_kernels, "packed_joint", None)
        decoder = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
        answers.append(decoder.decode([[5, 6, 7] * 22], Sampling(), 8)[0].ids)
    assert answers[0] == answers[1]


class Shifted(LlamaMLP):
    """A block with the library's names and another formula."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A little more."""
        return 1.01 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_with_another_formula_stays_as_it_is(dtype: torch.dtype) -> None:
    model: Any = tiny_target("llama", dtype).stock
    first = Shifted(model.config).to(dtype)
    first.load_state_dict(model.model.layers[0].mlp.state_dict())
    model.model.layers[0].mlp = first
    cpu_kernels.use_narrow_kernels(model)
    fused_blocks.use_fused_blocks(model)
    assert "forward" not in vars(first) and "forward" in vars(model.model.layers[1].mlp)

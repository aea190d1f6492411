"""Activation checkpointing changes what is kept, compiled blocks what runs: never the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.contracts.trainable import Trainable
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.judges.judge import Judge
from modules.layers import hanging_attention
from modules.layers.activation_checkpointing import use_activation_checkpointing
from modules.layers.decoder_layer import DecoderLayer
from modules.target.kernels import compiled_calls as compiled
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import built

TARGET = tiny_target()
NAMES = (
    "medusa",
    "chimera",
    "clover",
    "clover2",
    "hydra",
    "eagle",
    "eagle3",
    "fspad",
    "falcon",
    "independent",
    "sorted",
)


def drafter(name: str) -> Trainable:
    if name not in ("independent", "sorted"):
        return built(name, TARGET, shake=0.1)
    torch.manual_seed(0)
    found = (
        Independent(TARGET.shape, layers=2)
        if name == "independent"
        else S2D(TARGET.shape, exits=[1, 2])
    )
    found.initialise(TARGET)
    return found.double()


def kept_and_gradients(trainable: Trainable) -> tuple[int, float, list[Tensor]]:
    """Values kept for the backward pass that are no parameters, the loss, and the gradients."""
    batch = tiny_batch(TARGET)
    batch.states = TARGET.features(batch, trainable.training_states)
    parameters, kept = list(trainable.declared_parameters()), {}
    known = {parameter.data_ptr() for parameter in [*trainable.parameters(), *TARGET.parameters()]}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = trainable.loss(batch, TARGET, 0.5).total
    count = sum(tensor.numel() for tensor in kept.values())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return count, float(total.detach()), [torch.zeros(()) if one is None else one for one in found]


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_blocks_keep_less_and_have_the_same_gradients(name: str) -> None:
    plain, recomputing = drafter(name).train(), drafter(name).train()
    use_activation_checkpointing(recomputing)
    kept, loss, expected = kept_and_gradients(plain)
    fewer, same, found = kept_and_gradients(recomputing)
    assert fewer < kept and same == pytest.approx(loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["medusa", "clover", "clover2", "eagle3", "fspad", "falcon"])
def test_compiled_blocks_have_the_same_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    plain, other = drafter(name).train(), drafter(name).train()
    compiled.compile_blocks(other)
    use_activation_checkpointing(other)
    _, loss, expected = kept_and_gradients(plain)
    _, same, found = kept_and_gradients(other)
    assert same == pytest.approx(loss) and set(plain.state_dict()) == set(other.state_dict())
    for one, its in zip(found, expected, strict=True):
        torch.testing.assert_close(one, its)


def test_decoding_goes_on_as_before() -> None:
    layer, plain = DecoderLayer(TARGET.shape).double(), DecoderLayer(TARGET.shape).double()
    plain.load_state_dict(layer.state_dict())
    use_activation_checkpointing(layer)
    batch = tiny_batch(TARGET)
    hidden = TARGET.embed(batch.input_ids)
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, batch.rows()), plain(hidden, batch.rows()))


@pytest.mark.parametrize("limit", [1, 4 * 24 * 3])
def test_attention_in_parts_is_attention_at_once(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, and three."""
    _, loss, expected = kept_and_gradients(drafter("eagle3"))
    calls, whole = [], hanging_attention.hanging_attention

    def counted(queries: Tensor, *arguments: object) -> Tensor:
        calls.append(len(queries))
        return whole(queries, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(hanging_attention, "hanging_attention", counted)
    monkeypatch.setattr(hanging_attention, "MAX_SCORES", limit)
    _, same, found = kept_and_gradients(drafter("eagle3"))
    assert max(calls) == max(1, limit // (4 * 24)) and same == pytest.approx(loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_has_nothing_to_recompute_is_refused() -> None:
    with pytest.raises(
        ValueError, match="trainer.activation_checkpointing is true, but Judge has no layers"
    ):
        use_activation_checkpointing(Judge(TARGET.shape))
    with pytest.raises(
        ValueError, match="trainer.compile is true, but Judge has no blocks of its own"
    ):
        compiled.compile_blocks(Judge(TARGET.shape))

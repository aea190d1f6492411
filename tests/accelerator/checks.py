"""Seven families of drafters on the pretend accelerator: the CPU's tokens, losses and
distributions, and budgets of waits and launches that may only fall. `test_accelerator.py` runs
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.acceptance.rules import TypicalRule
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.trained import TrainedDrafter
from modules.layers import hanging_attention
from modules.losses import chunked
from modules.target.target import Target
from tests.accelerator.pretend import DEVICE, There, pretending
from tests.accelerator.table import ENDLESS, PROMPT, costs, moved, on, phases, waits
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import built

WAITS = {"medusa": 1, "clover": 4, "clover2": 1, "hydra": 1, "eagle": 4, "eagle3": 4, "fspad": 5}
"""By family: how often a decoding step waits for the device, at most."""
LAUNCHES = {
    "medusa": 55,
    "clover": 180,
    "clover2": 235,
    "hydra": 125,
    "eagle": 170,
    "eagle3": 192,
    "fspad": 270,
}
"""By family: kernels that drafting launches per step, at most."""
TABLE = Path(__file__).resolve().parents[2] / "docs/scale.md"


def pair(name: str, there: bool) -> tuple[Target, TrainedDrafter]:
    """A target and a drafter of the family, on the CPU or on the device."""
    target = tiny_target("llama", torch.float32)
    drafter: Any = built(name, target, 0.05).float()
    return (moved(target), drafter.to(DEVICE)) if there else (target, drafter)


@pytest.fixture(autouse=True)
def logged_phases() -> Iterator[None]:
    with phases():
        yield


@pytest.mark.parametrize("name", WAITS)
def test_decoding_gives_the_cpus_tokens_within_its_budgets(name: str) -> None:
    target, drafter = pair(name, False)
    expected = SpeculativeDecoder(target, drafter, stop_ids=ENDLESS).decode(PROMPT, Sampling(), 24)[
        0
    ]
    with pretending() as log:
        decoder = SpeculativeDecoder(*pair(name, True), stop_ids=ENDLESS)
        decoder.decode(PROMPT, Sampling(), 6)
        log.clear()
        found = decoder.decode(PROMPT, Sampling(), 24)[0]
    steps = len(found.accepted)
    assert found.ids == expected.ids and found.accepted == expected.accepted
    assert waits(log) / steps <= WAITS[name] + 0.5, sorted(log.waits.items())
    assert log.launches["draft"] / steps <= LAUNCHES[name]


def test_typical_acceptance_waits_for_nothing_but_the_answer() -> None:
    with pretending() as log:
        decoder = SpeculativeDecoder(*pair("medusa", True), rule=TypicalRule(), stop_ids=ENDLESS)
        decoder.decode(PROMPT, Sampling(), 8)
    assert {reason for phase, reason, _ in log.waits if phase == "accept"} == {"tolist"}


@pytest.mark.parametrize("name", WAITS)
def test_a_training_step_gives_the_cpus_loss_and_leaves_gradients_on_the_device(name: str) -> None:
    found = {}
    with pretending():
        for there in (False, True):
            target, drafter = pair(name, there)
            batch = on(target.device, tiny_batch(target))
            batch.states = target.features(batch, drafter.training_states)
            loss = drafter.loss(batch, target, 0.5).total
            loss.backward()
            loss = loss.detach()
            gradients: list[Any] = [parameter.grad for parameter in drafter.declared_parameters()]
            assert all(type(each) is (There if there else Tensor) for each in (loss, *gradients))
            found[there] = float(loss), sum(float(gradient.abs().sum()) for gradient in gradients)
    # The target's states are of the CPU's own kernels there, which sum in another order.
    assert found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("name", ["eagle3", "clover", "medusa"])
def test_launches_of_a_training_step_hardly_grow_with_its_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits of chunks that suit a CPU's memory would cut 64 tokens into many parts here."""
    monkeypatch.setattr(chunked, "MAX_LOGITS", 300)
    monkeypatch.setattr(hanging_attention, "MAX_SCORES", 1000)
    launches = []
    with pretending() as log:
        target, drafter = pair(name, True)
        for length in (32, 64):
            batch = on(DEVICE, tiny_batch(target, rows=1, length=length))
            batch.states = target.features(batch, drafter.training_states)
            log.clear()
            drafter.loss(batch, target, 0.5).total.backward()
            launches.append(sum(log.launches.values()))
    assert launches[1] <= 1.1 * launches[0], launches


@pytest.mark.parametrize("recipe", ["medusa", "eagle3", "dflash"])
def test_recipes_cost_what_the_table_says(recipe: str) -> None:
    """`python -m tests.accelerator.table` prints it anew."""
    (row,) = (line for line in TABLE.read_text().splitlines() if line.startswith(f"| {recipe} |"))
    said = [float(cell.split()[-1]) for cell in row.split("|")[2:-1]]
    found = astuple(costs(recipe))
    # Another build of torch may take an operator more, in its gradients above all.
    assert found == pytest.approx(said, rel=0.05, abs=0.6), (found, said)


def test_verification_writes_as_much_behind_a_long_context_as_behind_a_short_one() -> None:
    written = []
    with pretending() as log:
        target = moved(tiny_target("llama", torch.float32))
        tree = TokenTree.chain(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]).to(DEVICE))
        for length in (32, 256):
            session = target.open(1, 300)
            session.prefill(
                torch.full((1, length), 9).to(DEVICE), torch.tensor([length]).to(DEVICE)
            )
            log.clear()
            session.verify(tree)
            written.append(sum(log.written.values()))
    # Masks and what they are made of grow by 8 rows a slot; keys and values copied for every query
    # head would add 2 layers x 2 x 4 heads x 8 numbers.
    grown, copied = (written[1] - written[0]) / (256 - 32), 2 * 2 * 4 * 8 * 4
    assert grown < copied / 2, (written, grown, copied)


def test_the_librarys_own_model_keeps_its_attention() -> None:
    with pretending():
        target = moved(tiny_target("llama", torch.float32))
        models: list[Any] = [target.model, target.stock]
        implementations = [model.config._attn_implementation for model in models]
        ids = torch.tensor(PROMPT).to(DEVICE)
        found = [torch.tensor(model(input_ids=ids).logits.tolist()) for model in models]
    assert implementations == ["grouped_sdpa", "sdpa"]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_operands_of_two_devices_are_refused() -> None:
    with pretending() as log:
        rows = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="two devices in add"):
            _ = rows + torch.ones(3)
        log.clear()
        assert rows[torch.tensor([1])].device == DEVICE and rows.sum().item() == 3
        assert rows[rows > 0].shape == (3,) and rows.tolist() == [1, 1, 1]
        assert [reason for _, reason, _ in log.waits] == [
            "an index of the host",
            "_local_scalar_dense",
            "a boolean index",
            "tolist",
        ]

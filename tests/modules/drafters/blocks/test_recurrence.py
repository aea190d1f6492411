"""What Falcon's layer reads."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from modules.drafters.blocks.recurrence import RECURRENT_LAYERS, NewestRow, Recurrence
from modules.drafters.feature.eagle import Eagle
from tests.modules.drafters.blocks.test_falcon import TARGET, falcon, text
from tests.modules.families import filled


@torch.no_grad()
def test_it_does_not_see_the_scale_of_what_it_reads_unless_asked_to() -> None:
    torch.manual_seed(0)
    size = 16
    given, memory = (
        torch.randn(2, 5, 2 * size).double(),
        torch.zeros(2, 2 * RECURRENT_LAYERS, size).double(),
    )
    scales = torch.tensor([7.0, 90.0]).repeat_interleave(size)
    scaled = Recurrence(size, 0.0, unit_scale=True).double()
    torch.testing.assert_close(
        scaled(given * scales, memory), scaled(given, memory), rtol=1e-5, atol=1e-5
    )
    papers = Recurrence(size, 0.0, unit_scale=False).double()
    assert not torch.allclose(papers(given * scales, memory)[0], papers(given, memory)[0])


@pytest.mark.parametrize("counts", [None, [1, 4, 2]])
def test_few_rows_one_by_one_are_what_the_library_makes_of_them(counts: list[int] | None) -> None:
    torch.manual_seed(1)
    size = 8
    recurrence = Recurrence(size, 0.3, unit_scale=True).double().eval()
    given, memory = (
        torch.randn(3, 4, 2 * size).double(),
        torch.randn(3, 2 * RECURRENT_LAYERS, size).double(),
    )
    counts_B = None if counts is None else torch.tensor(counts)
    expected, behind = recurrence(given, memory, counts_B)
    with torch.no_grad():
        found, found_behind = recurrence(given, memory, counts_B)
    torch.testing.assert_close(found_behind, behind)
    for row, count in enumerate(counts or [4, 4, 4]):
        torch.testing.assert_close(found[row, :count], expected[row, :count])


@torch.no_grad()
def test_rows_of_a_block_start_from_its_newest_one_and_can_learn_to_keep_their_own() -> None:
    newest, block = NewestRow(3, 4), torch.randn(5, 3, 4)
    torch.testing.assert_close(newest(block), block[:, 2:].expand(-1, 3, -1))
    newest.maps[0].weight.zero_()
    torch.testing.assert_close(
        newest(block), torch.stack([block[:, 0], block[:, 2], block[:, 2]], 1)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({}, [5, 5, 9, 9]),
        ({"newest_row": False}, [4, 5, 8, 9]),
        ({"relaxed_mask": False}, [4, 5, 8, 9]),
    ],
)
def test_features_pass_through_at_first(arguments: dict[str, bool], rows: list[int]) -> None:
    """An untrained drafter puts out its inputs, of a block the newest one's, up to the tokens'
    share.
    """
    drafter, batch = falcon(shake=0.0, **arguments), text(12)
    filled(batch, drafter, TARGET)
    assert drafter.fc is not None
    features, following = drafter.inputs(batch)
    drafter.fc.weight[:, : TARGET.shape.hidden_size] = 0
    outputs = drafter.outputs(batch, TARGET, torch.tensor([5, 9]), features, following)
    torch.testing.assert_close(outputs.flatten(0, 1), features[rows])


def test_ablations_leave_out_what_they_say() -> None:
    size = TARGET.shape.hidden_size
    whole, papers = falcon(shake=0.0), falcon(pass_through=False)
    assert whole.fc is not None and whole.recall is not None and whole.recurrence is not None
    assert papers.fc is None and papers.recall is None and papers.recurrence is not None
    assert not bool(whole.recall.weight.any()), "the recurrence adds nothing at first"
    linear = falcon(lstm=False, shake=0.0)
    assert linear.recurrence is None and linear.fc is not None
    assert torch.equal(linear.fc.weight[:, size:], torch.eye(size).double())
    assert isinstance(Eagle(TARGET.shape).fc, type(linear.fc))


def test_whole_documents_are_read_outside_their_own_devices_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is `meta`, which has no autocast of its own; the call says which one it turns
    off."""
    asked: list[tuple[str, bool]] = []

    def autocast(device: str, enabled: bool) -> nullcontext:
        asked.append((device, enabled))
        return nullcontext()

    recurrence, size = Recurrence(4, 0.0, unit_scale=True).to("meta"), 4
    monkeypatch.setattr(recurrence.lstm, "forward", lambda rows, parts: rows)
    monkeypatch.setattr(torch, "autocast", autocast)
    out = recurrence.over(torch.zeros(6, 2 * size, device="meta"), [])
    assert out.device.type == "meta" and asked == [("meta", False)]

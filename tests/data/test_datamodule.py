"""Batches in an order that can be taken up anywhere, held-out prompts that stay apart, and bad
settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.datamodule import Batches, ConversationData, hold_out
from data.packing import collate
from data.vocabulary import coverage
from modules.contracts.batches import PreferenceBatch, TextBatch
from modules.target.target import Target
from tests.data.test_packing import document
from tests.fakes import tiny_target

WORDS = ["red", "green", "blue", "grey", "black", "white", "pink", "brown"]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {"prompt": f"{one} and {two}", "response": f"{two}, {number}"}
        for one in WORDS
        for two in WORDS[:5]
        for number in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def bound(source: str, target: Target, states: tuple = (), **settings: Any) -> ConversationData:
    data = ConversationData(source, max_length=64, validation_fraction=0.2, **settings)
    data.bind(target, states)
    return data


def ids(batches: Any) -> list[list]:
    return [batch.input_ids.tolist() for batch in batches]


# -- order -----------------------------------------------------------------------------------------


def batches(**settings: Any) -> Batches:
    return Batches([document(4 + i % 9, i) for i in range(30)], 16, 2, **settings)


def test_an_epoch_holds_every_document_once_and_epochs_differ() -> None:
    loader = batches()
    seen = [document for row in loader.packed for document in row]
    assert sorted(seen) == list(range(30))
    assert sum(int(batch.loss_mask.sum()) for batch in loader) == sum(
        d.response_tokens for d in loader.documents
    )
    assert len(list(loader)) == len(loader)
    assert loader.order(0) != loader.order(1)
    assert loader.order(0) == batches().order(0) != batches(seed=1).order(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_order_goes_on_with_the_next_batch(workers: int) -> None:
    loader = batches(workers=workers)
    loader.set_epoch(3)
    walk = iter(loader)
    first = [next(walk).input_ids.tolist() for _ in range(4)]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = ids(walk)
    resumed = batches(workers=workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert ids(resumed) == rest
    assert len(first) + len(rest) == len(loader)
    resumed.set_epoch(4)
    assert len(ids(resumed)) == len(loader)


def test_a_walk_left_early_starts_again() -> None:
    loader = batches()
    assert next(iter(loader)).input_ids.tolist() == next(iter(loader)).input_ids.tolist()


def test_a_state_of_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match="--resume"):
        batches(seed=1).load_state_dict(batches().state_dict())


def test_ranks_share_the_batches_and_take_as_many_each() -> None:
    alone, ranks = batches(), [batches(rank=rank, world=3) for rank in range(3)]
    assert {len(rank.order(2)) for rank in ranks} == {len(ranks[0])}
    shared = [
        rows for step in zip(*(rank.order(2) for rank in ranks), strict=True) for rows in step
    ]
    assert shared[: len(alone)] == alone.order(2)


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_ranks_repeat_at_the_end_has_no_labels(shuffle: bool) -> None:
    """So all ranks together count what one process counts, step by step, after a resumption too."""
    alone = batches(shuffle=shuffle)
    world = next(count for count in range(2, 9) if len(alone) % count not in (0, count - 1))
    ranks = [batches(shuffle=shuffle, rank=rank, world=world) for rank in range(world)]
    wanted = [int(batch.loss_mask.sum()) for batch in alone]
    found = [[int(batch.loss_mask.sum()) for batch in rank] for rank in ranks]
    together = [count for step in zip(*found, strict=True) for count in step]
    assert together[: len(wanted)] == wanted and set(together[len(wanted) :]) == {0}
    assert all(int((batch.document_ids >= 0).sum()) > 0 for batch in ranks[-1])
    resumed = batches(shuffle=shuffle, rank=world - 1, world=world)
    resumed.load_state_dict({**ranks[-1].state_dict(), "batch": len(ranks[-1]) - 1})
    assert [int(batch.loss_mask.sum()) for batch in resumed] == [0]


class Recorder(LightningModule):
    """Learns nothing; remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list] = []

    def training_step(self, batch: TextBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append([self.current_epoch, batch_idx, batch.input_ids.tolist()])
        return self.weight * 1.0

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        assert isinstance(batch, TextBatch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, steps: int, every: int, callbacks: tuple[Callback, ...] = ()) -> Trainer:
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[keep, *callbacks],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def test_lightning_resumes_with_the_same_batches(
    source: str, target: Target, tmp_path: Path
) -> None:
    whole = Recorder()
    data = bound(source, target)
    epoch = len(data.train_dataloader())
    steps = 2 * epoch + 2
    trainer(tmp_path, steps, every=1).fit(whole, datamodule=data)
    assert [step[0] for step in whole.seen].count(0) == epoch
    for done in (2, epoch, epoch + 3):
        resumed = Recorder()
        trainer(tmp_path / "again", steps, every=1000).fit(
            resumed,
            datamodule=bound(source, target),
            ckpt_path=tmp_path / f"step={done}.ckpt",
            weights_only=False,
        )
        assert resumed.seen == whole.seen[done:], (
            f"resumed after {done} of {epoch} batches an epoch"
        )


# -- what it holds ---------------------------------------------------------------------------------


def test_answers_to_one_prompt_stay_on_one_side_and_more_data_moves_none(
    source: str, target: Target
) -> None:
    data = bound(source, target)
    trained, held = ({tuple(d.prompt) for d in side} for side in (data.documents, data.held_out))
    assert trained and held and not trained & held
    assert len(data.documents) + len(data.held_out) == 80
    fewer, _ = hold_out([*data.documents, *data.held_out][:40], 0.2)
    assert {d.key for d in fewer} <= {d.key for d in data.documents}


def test_one_prompt_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="data.validation"):
        hold_out([document(4)] * 3, 0.5)


def test_a_validation_set_of_its_own_and_budgets(source: str, target: Target) -> None:
    data = bound(
        source, target, validation=source, max_response_tokens=100, max_validation_tokens=30
    )
    assert 100 <= data.response_tokens < 112
    assert 30 <= sum(d.response_tokens for d in data.held_out) < 42
    assert data.documents[0].key == data.held_out[0].key


def test_probe_prompts_end_where_the_assistant_speaks(source: str, target: Target) -> None:
    prompts = bound(source, target).probe_prompts(3)
    assert len(prompts) == 3 and len({tuple(prompt) for prompt in prompts}) == 3
    assert all(
        prompt[-1] == target.tokenizer.convert_tokens_to_ids("<|assistant|>") for prompt in prompts
    )


def test_the_vocabulary_comes_from_training_answers(source: str, target: Target) -> None:
    data = bound(source, target)
    vocabulary = data.vocabulary(12)
    assert vocabulary.dtype == torch.int64 and vocabulary.tolist() == sorted(
        set(vocabulary.tolist())
    )
    size = target.shape.vocab_size
    assert target.eos_ids <= set(vocabulary.tolist())
    assert 0.5 < coverage(data.held_out, vocabulary, size) <= 1


def test_the_fingerprint_tells_data_apart(source: str, target: Target) -> None:
    data = bound(source, target)
    assert data.fingerprint() == bound(source, target).fingerprint()
    assert data.fingerprint() != bound(source, target, max_response_tokens=100).fingerprint()
    assert data.summary()["response_tokens"] == data.response_tokens


def test_cached_states_arrive_in_their_places(source: str, target: Target, tmp_path: Path) -> None:
    data = bound(source, target, ("final", 1), features=str(tmp_path), features_dtype="float32")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            real = batch.document_ids >= 0
            for name, state in target.features(batch, ["final", 1]).items():
                torch.testing.assert_close(
                    batch.states[name][real], state[real], rtol=1e-4, atol=1e-4
                )


def test_no_states_are_cached_for_who_reads_none(
    source: str, target: Target, tmp_path: Path
) -> None:
    data = bound(source, target, (), features=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert next(iter(data.train_dataloader())).states == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "data.max_length must be 2 or above, got 1"),
        ({"rows": 0}, "data.rows must be 1"),
        ({"validation_fraction": 0.0}, "data.validation_fraction"),
        ({"train": "none.jsonl"}, "does not exist"),
        ({"max_response_tokens": 0}, "data.max_response_tokens"),
        ({"validation": "no.parquet"}, "does not exist"),
    ],
)
def test_bad_settings_are_refused_before_a_model_loads(
    settings: dict[str, Any], message: str, source: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationData(**{"train": source, **settings})


def test_rows_beyond_the_context_are_refused(source: str, target: Target) -> None:
    with pytest.raises(ValueError, match="data.max_length is 4096"):
        ConversationData(source, max_length=4096).bind(target)


def test_batches_are_pinned_and_prefetched_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies then run beside its work."""
    made: dict[str, Any] = {}

    def loader(_: Any, **options: Any) -> list[Any]:
        made.update(options)
        return []

    monkeypatch.setattr("data.datamodule.DataLoader", loader)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert list(Batches([document(5, 0)], 8, 1, workers=3)) == []
    assert made["pin_memory"] and made["prefetch_factor"] == 4 and made["num_workers"] == 3
    list(Batches([document(5, 0)], 8, 1))
    assert made["prefetch_factor"] is None


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (seen.append(self), self + 0)[1])
    text = collate([[document(5, 0)]], [[{"final": torch.ones(5, 4)}]])
    batch = PreferenceBatch(text, text, chosen_reference=torch.zeros(1, 5)).pin_memory()
    assert len(seen) == 2 * 5 + 1 and batch.errors is None
    assert batch.chosen.states["final"] is not text.states["final"]
    assert torch.equal(batch.chosen.states["final"], text.states["final"])

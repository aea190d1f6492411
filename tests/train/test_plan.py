"""The plan's arithmetic, what it prints, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.command_line.loading import run as one_line_run
from modules.contracts.trainable import GradientLayers
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.medusa import Medusa
from modules.drafters.heads.medusa2 import Medusa2
from modules.drafters.small_models.independent import Independent
from modules.layers.hanging_attention import MAX_SCORES
from modules.losses.chunked import MAX_LOGITS
from modules.preference.cdpo import ContrastiveEstimator
from modules.preference.dpo import DPO
from tests.fakes import tiny_batch, tiny_target
from train.cli import command
from train.plan import (
    GIB,
    Size,
    alternatives,
    available,
    check_disk,
    check_fits,
    in_effect,
    layer_values,
    logit_bytes,
    measure,
    memory,
    score_bytes,
)
from train.settings import TrainerSettings

TARGET = tiny_target(dtype=torch.float32)
SIZE = Size(
    trainable=10**9,
    frozen=7 * 10**9,
    target_bytes=2,
    tokens=2048,
    steps=3,
    shape=TARGET.shape,
    width=128,
    names=("final",),
    row=1024,
)


@pytest.mark.parametrize(
    "strategy, precision, expected",
    [
        ("auto", "32-true", (4, 4, 8, 0)),
        ("ddp", "bf16-mixed", (6, 4, 8, 0)),
        ("auto", "64-true", (8, 8, 16, 0)),
        ("deepspeed_1", "32-true", (4, 4, 2, 0)),
        ("deepspeed_2", "bf16-mixed", (2, 0.5, 3, 0)),
        ("deepspeed_3", "bf16-mixed", (0.5, 0.5, 3, 0)),
        ("deepspeed_2_offload", "bf16-mixed", (2, 0.5, 0, 3)),
    ],
)
def test_bytes_per_parameter_on_four_processes(
    strategy: str, precision: str, expected: tuple[float, ...]
) -> None:
    found = memory(SIZE, strategy, precision, world=4)
    parts = (found.parameters, found.gradients, found.optimiser, found.host)
    assert tuple(part / SIZE.trainable for part in parts) == expected
    value = {"bf16-mixed": 2, "32-true": 4, "64-true": 8}[precision]
    assert found.target == 14e9 and found.features == SIZE.tokens * 32 * value


def test_double_precision_takes_twice_the_activations() -> None:
    small = replace(SIZE, target_bytes=8, layers=GradientLayers(TARGET.shape))
    single, double = (
        memory(replace(small, target_bytes=width), "auto", precision, 1)
        for width, precision in ((4, "32-true"), (8, "64-true"))
    )
    running = 4 * SIZE.tokens * SIZE.row
    assert double.activations - running == 2 * (single.activations - running)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    settings = TrainerSettings(accelerator="cpu", devices=4, strategy="ddp")
    room = memory(SIZE, "deepspeed_2", "32-true", 4).total + 1
    check_fits(SIZE, replace(settings, strategy="deepspeed_2"), room)
    with pytest.raises(
        ValueError, match="strategy ddp needs 28.. GiB .* set trainer.strategy deepspeed_2 and"
    ):
        check_fits(SIZE, settings, room)
    with pytest.raises(ValueError, match="use a smaller target"):
        check_fits(SIZE, settings, GIB)
    with pytest.raises(ValueError, match="lower data.max_length to 262144$"):
        wide = replace(SIZE, trainable=1, frozen=1, tokens=2**20, row=2**20)
        check_fits(
            wide,
            settings,
            memory(replace(wide, tokens=2**18, row=2**18), "ddp", "32-true", 4).total,
        )
    tall = replace(SIZE, tokens=10**8, row=64)
    with pytest.raises(ValueError, match="lower data.rows"):
        check_fits(tall, settings, memory(SIZE, "ddp", "32-true", 4).total)


def test_rows_longer_than_the_context_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("train.cli.outline", lambda *_: TARGET)
    arguments = ["--config", "clover.yaml", "--data.max_length", "100000", "--plan"]
    with pytest.raises(ValueError, match="data.max_length is 100000, but the context of target"):
        command(arguments)


def test_a_disk_that_is_too_small_is_refused(tmp_path) -> None:
    check_disk(10, tmp_path / "not" / "yet")
    with pytest.raises(ValueError, match="data.features needs .* int8"):
        check_disk(1e18, tmp_path)
    with pytest.raises(
        ValueError, match="data.features_gib is 0.5, but data.features needs 1 GiB: raise it"
    ):
        check_disk(2**30, tmp_path, gib=0.5)


def test_parameters_are_counted_without_weights() -> None:
    with torch.device("meta"):
        heads = Medusa(TARGET.shape, 2, draft_vocabulary=48)
    size = measure(heads, TARGET, rows=2, length=64)
    assert size.trainable == 2 * (32 * 32 + 32 + 48 * 32) and (
        size.width,
        size.steps,
        size.tokens,
    ) == (48, 2, 128)
    assert size.frozen == sum(parameter.numel() for parameter in TARGET.parameters())


def test_the_command_prints_and_stops(recipe, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("train.cli.outline", lambda *_: TARGET)
    arguments = [
        "--config",
        str(recipe),
        "--plan",
        "--output",
        str(tmp_path / "run"),
        "--data.features",
        str(tmp_path / "features"),
        "--data.features_dtype",
        "int8",
        "--trainer.devices",
        "2",
    ]
    assert command(arguments) == 0
    said = capsys.readouterr().out
    for words in (
        "trainable parameters  5,184",
        "tokens per step       256",
        "deepspeed_3 ",
        "feature cache",
        "* auto",
    ):
        assert words in said
    assert "offload" not in said, "on a CPU it changes nothing"
    assert not (tmp_path / "run").exists() and not (tmp_path / "features").exists()
    monkeypatch.setattr("train.cli.outline", lambda *_: TARGET)
    monkeypatch.setattr("train.plan.available", lambda _: 1.0)
    assert (
        one_line_run(command, arguments) == 2
        and "error: trainer.strategy auto needs" in capsys.readouterr().err
    )


def test_logits_and_scores_are_counted_as_they_are_kept() -> None:
    """A frozen head's logits are those of one chunk; a learning one keeps every step's, and soft
    labels their distributions.
    """
    wanted, own = SIZE.tokens * SIZE.width, replace(SIZE, own_head=True, soft=True)
    assert logit_bytes(SIZE) == 3 * 4 * wanted
    assert logit_bytes(own) == 4 * wanted * (4 + 2 * 2 + 1)
    assert logit_bytes(replace(own, width=10**6)) == 4 * 4 * MAX_LOGITS
    heads = TARGET.shape.num_heads
    hanging = replace(SIZE, score_heads=heads, most_scores=MAX_SCORES, row=128)
    scores = 128 * 128 * heads * SIZE.tokens / 128
    assert score_bytes(SIZE) == 0 and score_bytes(hanging) == 4 * 3 * 3 * scores
    assert score_bytes(replace(hanging, recomputed=True)) == 4 * 3 * scores
    assert score_bytes(replace(hanging, row=10**5)) == 4 * 3 * MAX_SCORES


def test_what_a_component_keeps_is_read_from_it() -> None:
    eagle, heads = (
        Eagle3(TARGET.shape, draft_vocabulary=48),
        Medusa(TARGET.shape, 2, lm_head="shared"),
    )
    sizes = [measure(one, TARGET, rows=1, length=64) for one in (eagle, heads)]
    assert [(size.own_head, size.soft, size.score_heads) for size in sizes] == [
        (True, True, TARGET.shape.num_heads),
        (False, False, 0),
    ]


def test_free_memory_counts_what_the_system_can_give_back(monkeypatch, tmp_path) -> None:
    (tmp_path / "meminfo").write_text("MemFree:  100 kB\nMemAvailable:  4000 kB\n")
    monkeypatch.setattr("modules.runtime.host_memory.MEMORY", tmp_path / "meminfo")
    assert available(TrainerSettings(accelerator="cpu", devices=4)) == 1000 * 1024
    monkeypatch.setattr("modules.runtime.host_memory.MEMORY", tmp_path / "none")
    assert available(TrainerSettings(accelerator="cpu")) == 1 << 62


def test_on_a_cpu_offloading_saves_nothing_and_is_not_recommended() -> None:
    settings = TrainerSettings(accelerator="cpu", devices=4, strategy="deepspeed_2_offload")
    room = memory(SIZE, "deepspeed_2_offload", "32-true", 4).total + 1
    assert in_effect("deepspeed_2_offload", settings) == "deepspeed_2" and alternatives(
        settings
    ) == ["deepspeed_2", "deepspeed_3"]
    with pytest.raises(ValueError, match="needs .* GiB .*: (?!.*offload)"):
        check_fits(SIZE, settings, room)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes kept for a backward pass, weights left out."""

    def __init__(self, weights) -> None:
        self.weights, self.found, self.alive = {weight.data_ptr() for weight in weights}, {}, []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.found[storage.data_ptr()] = storage.nbytes()
        self.alive.append(tensor)
        return tensor


@pytest.mark.parametrize(
    "component",
    [
        Independent(TARGET.shape, layers=2),
        DPO(TARGET.shape, 2, 4.0, 0.0, 0.1),
        DPO(TARGET.shape, 2, 4.0, 0.1, 0.1),
    ],
)
def test_layers_that_run_with_a_gradient_are_counted(component) -> None:
    """Within a third of what autograd keeps, on the high side but for a few percent."""
    if isinstance(component, Independent):
        component.initialise(TARGET)
    model = (
        component.language_model
        if isinstance(component, Independent)
        else component.policy.twin(TARGET)
    )
    batch = tiny_batch(TARGET)
    weights = [*component.parameters(), *model.parameters(), *model.buffers()]
    kept = Kept(weights)
    with kept:
        model.features(batch, ("final",), gradient=True)
    planned = 4 * layer_values(component.footprint(1, 64).layers) * batch.input_ids.numel()
    assert 0.9 < planned / sum(kept.found.values()) < 1.35


def test_pairs_are_two_rows_and_components_without_layers_keep_none() -> None:
    pairs = measure(DPO(TARGET.shape, 2, 4.0, 0.0, 0.1), TARGET, rows=3, length=64)
    assert (pairs.tokens, pairs.sides) == (2 * 3 * 64, 2) and layer_values(pairs.layers) > 0
    heads, tuned = (kind(TARGET.shape, 2).footprint(1, 64).layers for kind in (Medusa, Medusa2))
    assert layer_values(heads) == 0 and layer_values(tuned) > 0
    assert layer_values(tuned, recomputed=True) == layer_values(tuned)
    layers = Independent(TARGET.shape, layers=2).footprint(1, 64).layers
    assert layer_values(layers, recomputed=True) == layer_values(layers) / 2 + 2 * 32


@pytest.mark.parametrize("recipe", ["independent", "s2d"])
def test_language_models_are_planned_without_weights(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("train.plan.available", lambda _: 80.0 * GIB)
    assert command(["--config", f"{recipe}.yaml", "--plan"]) == 0
    assert "trainable parameters" in capsys.readouterr().out


def test_a_pairs_estimator_is_counted_as_its_policy_is() -> None:
    estimator = ContrastiveEstimator(TARGET.shape, 2, 4.0, 0.1).footprint(3, 64)
    policy = DPO(TARGET.shape, 2, 4.0, 0.1, 0.1).footprint(3, 64)
    assert estimator == policy and policy.layers is not None and policy.layers.dropout

"""Rows from methods: names, adapted targets, shared drafters, refused pairings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance
from eval.methods.rows import Method, build_rows, load_drafter
from modules.contracts.sampling import Sampling
from modules.drafters.heads.medusa import Medusa
from modules.drafters.heads.medusa2 import Medusa2
from modules.target.target import Target
from tests.fakes import tiny_target, tiny_tokenizer


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def runs(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for kind in (Medusa, Medusa2):
        drafter = kind(target.shape)
        drafter.initialise(target)
        save_pretrained(drafter, folder / kind.__name__.lower() / "drafter", Provenance.of(target))
    return folder


def test_names_come_from_folders_and_classes() -> None:
    assert (
        Method(drafter="runs/clover").label
        == Method(drafter="runs/clover/drafter").label
        == "clover"
    )
    assert Method(drafter="user/name").label == "name"
    assert (
        Method(decoder={"class_path": "eval.methods.huggingface.HuggingFaceGenerate"}).label
        == "hf_generate"
    )
    assert Method(drafter={"class_path": "modules.drafters.heads.medusa.Medusa"}).label == "medusa"


def test_a_drafter_that_adapts_its_target_gets_its_own_baseline(target: Target, runs: Path) -> None:
    rows = build_rows(
        [
            Method(drafter=str(runs / "medusa")),
            Method(drafter=str(runs / "medusa2")),
            Method("twice", str(runs / "medusa2"), budget=2),
        ],
        target,
        Sampling(),
    )
    assert [(row.name, row.baseline) for row in rows] == [
        ("autoregressive", "autoregressive"),
        ("medusa", "autoregressive"),
        ("autoregressive of medusa2", "autoregressive of medusa2"),
        ("medusa2", "autoregressive of medusa2"),
        ("twice", "autoregressive of medusa2"),
    ]
    assert (
        rows[3].target is rows[4].target is rows[2].target is not target
        and rows[1].target is target
    )
    assert rows[1].drafter_parameters > 0 and rows[4].budget == 2


def test_rules_by_temperature(target: Target, runs: Path) -> None:
    source = str(runs / "medusa")
    methods = [
        Method("cold", source),
        Method("hot", source, temperature=1.0),
        Method("lossy", source, rule="typical"),
    ]
    rows = {row.name: row for row in build_rows(methods, target, Sampling())}
    assert (
        rows["cold"].rule == "greedy"
        and rows["hot"].rule == "point"
        and not rows["lossy"].claims_lossless
    )
    assert rows["hot"].baseline == "autoregressive at 1"
    with pytest.raises(
        ValueError, match="rule 'greedy' does not sample at temperature above 0: use 'point'"
    ):
        build_rows([Method("x", source, rule="greedy", temperature=1.0)], target, Sampling())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 10**9}, "methods: x: budget 1000000000 is more than 65536 nodes"),
        ({"budget": 0}, "methods: x: budget 0 drafts nothing"),
        (
            {"rule": "greedy", "temperature": 1.5},
            "methods: x: rule 'greedy' does not sample at temperature 1.5: leave the rule out",
        ),
    ],
)
def test_settings_that_cannot_run_are_refused_before_anything_loads(settings, words) -> None:
    source = {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"}
    with pytest.raises(ValueError, match=words):
        Method("x", source, **settings).check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 20}, "budget must be at least 65, got 20"),
        ({"budget": "abc"}, "budget must be a whole number, got 'abc'"),
        ({"budgte": 128}, "unexpected keyword argument 'budgte': did you mean budget?"),
    ],
)
def test_policies_are_refused_by_row_and_key(arguments: dict[str, Any], words: str) -> None:
    """Without a target."""
    policy = {"class_path": "modules.sparse_kv.sentence_kv.SentenceKV", "init_args": arguments}
    decoder = "modules.drafters.self_speculative.sparse_kv.decoding.SparseDecoder"
    row = Method("mine", decoder={"class_path": decoder, "init_args": {"policy": policy}})
    with pytest.raises(ValueError, match=f"methods: mine: policy: .*{words}"):
        row.check()


def test_a_drafter_takes_the_targets_precision_and_not_any_target(
    target: Target, runs: Path
) -> None:
    drafter = load_drafter(str(runs / "medusa"), target)
    assert {parameter.dtype for parameter in drafter.parameters()} == {target.dtype}
    source = str(runs / "medusa")
    rows = build_rows(
        [Method("coarse", source), Method("as asked", source, precision="float16")],
        target,
        Sampling(),
        "bfloat16",
    )
    decoders: list[Any] = [row.decoder for row in rows[1:]]
    dtypes = [next(decoder.drafter.parameters()).dtype for decoder in decoders]
    assert dtypes == [torch.bfloat16, torch.float16] and rows[1].draft_precision == "bfloat16"
    with pytest.raises(ValueError, match="was trained for"):
        load_drafter(str(runs / "medusa"), tiny_target(seed=1))


def test_any_small_model_drafts_as_it_is(tmp_path: Path) -> None:
    """The target itself as the small model: every drafted token is accepted."""
    target = tiny_target()
    target.tokenizer = tiny_tokenizer()
    target.stock.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    source = {
        "class_path": "modules.drafters.small_models.independent.Independent",
        "init_args": {"model": str(tmp_path), "draft_length": 3},
    }
    decoder: Any = build_rows([Method("small", source)], target, Sampling())[1].decoder
    decoder.stop_ids = frozenset()
    (trace,) = decoder.decode([[5, 3, 2]], Sampling(), 13)
    assert trace.accepted == [4, 4, 4] and sum(trace.drafted) == 9

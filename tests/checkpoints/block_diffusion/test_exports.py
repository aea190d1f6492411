"""Exports of DFlash and DSpark, held against what engines make of them, and imports of the same
folders.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.formats.known import FORMATS
from checkpoints.pretrained import load_pretrained, warm_start
from modules.drafters.block_diffusion.dflash import DFlash
from modules.drafters.block_diffusion.dspark import DSpark
from tests.checkpoints.block_diffusion.engines import FlatDFlash, FlatDSpark, Wrapped
from tests.checkpoints.test_exports import (
    DRAFTED,
    LAYERS,
    PROMPTS,
    agrees,
    exported,
    ours,
    returns,
    shaken,
)
from tests.fakes import tiny_target

TARGET = tiny_target(layers=LAYERS)
FUSED = [None, [6, 1, 4, 2]]


@pytest.mark.parametrize("fused", FUSED, ids=str)
def test_dflash_drafts_the_same_in_its_own_layout(tmp_path, fused) -> None:
    drafter = shaken(DFlash(TARGET.shape, 3, fused_layers=fused), TARGET)
    folder = exported(drafter, TARGET, "dflash", tmp_path)
    agrees(FlatDFlash(folder), drafter, TARGET)
    back = returns(folder, drafter, TARGET)
    assert back.arguments["layout"] == "fill_in" and back.block == 3


@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
@pytest.mark.parametrize("fused", FUSED, ids=str)
def test_dflash_drafts_the_same_in_vllm(tmp_path, vocabulary, fused) -> None:
    drafter = shaken(
        DFlash(TARGET.shape, 4, draft_vocabulary=vocabulary, fused_layers=fused), TARGET
    )
    folder = exported(drafter, TARGET, "dflash_speculators", tmp_path)
    agrees(Wrapped(folder), drafter, TARGET)
    assert returns(folder, drafter, TARGET).draft_size == drafter.draft_size


@pytest.mark.parametrize("layout", ["shift", "fill_in"])
@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
@pytest.mark.parametrize(
    ("form", "engine"), [("dspark", FlatDSpark), ("dspark_speculators", Wrapped)]
)
def test_dspark_drafts_the_same_in_engines(tmp_path, form, engine, vocabulary, layout) -> None:
    drafter = DSpark(TARGET.shape, 3, draft_vocabulary=vocabulary, rank=6, layout=layout)
    drafter = shaken(drafter, TARGET)
    folder = exported(drafter, TARGET, form, tmp_path)
    agrees(engine(folder), drafter, TARGET)
    back = returns(folder, drafter, TARGET)
    assert back.arguments["layout"] == layout
    for name, tensor in drafter.confidence_head.state_dict().items():
        assert torch.equal(back.confidence_head.state_dict()[name], tensor)


def test_drafts_differ_between_layouts() -> None:
    """So that the comparisons above would see a slot that is off by one."""
    drafter = shaken(DFlash(TARGET.shape, 3), TARGET)
    first = [ours(drafter, TARGET, ids) for ids in PROMPTS]
    assert len({token for ids in first for token in ids}) > 3


def test_draft_ids_in_another_order_are_sorted(tmp_path) -> None:
    drafter = shaken(DSpark(TARGET.shape, 3, draft_vocabulary=DRAFTED, rank=6), TARGET)
    folder = exported(drafter, TARGET, "dspark", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    order = torch.randperm(DRAFTED)
    ids = tensors["d2t"] + torch.arange(DRAFTED)
    tensors["d2t"] = ids[order] - torch.arange(DRAFTED)
    for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, folder / "model.safetensors")
    agrees(FlatDSpark(folder), drafter, TARGET)
    returns(folder, drafter, TARGET)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from the LM head of tiny-llama"):
        load_pretrained(folder, TARGET)


@pytest.mark.parametrize(
    ("kind", "form", "arguments", "words"),
    [
        (
            DFlash,
            "dflash",
            {"layout": "shift"},
            "layout is 'shift': engines run DFlash as 'fill_in'",
        ),
        (DFlash, "dflash_speculators", {"layout": "shift"}, "layout is 'shift': engines run"),
        (DFlash, "dflash", {"draft_vocabulary": 40}, "use --format dflash_speculators"),
        (DFlash, "dflash", {"fused_layers": [0, 2]}, r"none before the first layer \(0\)"),
        (DFlash, "dflash", {"fused_layers": [2, 2]}, "engines pass each state once"),
        (DSpark, "dspark", {"markov": "rnn"}, "markov is 'rnn': engines run 'vanilla' only"),
        (DSpark, "dspark_speculators", {"markov": "gated"}, "markov is 'gated': engines run"),
    ],
)
def test_what_engines_would_read_otherwise_is_refused(kind, form, arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        FORMATS[form].exported(kind(TARGET.shape, **arguments), TARGET)


def test_a_warm_start_from_an_export_never_mixes_layouts(tmp_path) -> None:
    drafter = shaken(DSpark(TARGET.shape, 3, rank=6, draft_vocabulary=DRAFTED), TARGET)
    folder = exported(drafter, TARGET, "dspark", tmp_path)
    other = DSpark(TARGET.shape, 3, rank=6, draft_vocabulary=DRAFTED).double()
    other.initialise(TARGET)
    warm_start(other, folder)
    assert torch.equal(other.fc.weight, drafter.fc.weight)
    other = DSpark(TARGET.shape, 3, rank=6, draft_vocabulary=DRAFTED, layout="fill_in").double()
    other.initialise(TARGET)
    with pytest.raises(ValueError, match="layout 'shift' there and 'fill_in' here"):
        warm_start(other, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "only full_attention is supported"),
        ({"markov_head_type": "rnn"}, "markov_head_type is 'rnn', only 'vanilla'"),
    ],
)
def test_configs_that_ask_for_something_else_are_refused(tmp_path, change, words) -> None:
    import json

    drafter = shaken(DSpark(TARGET.shape, 3, rank=6), TARGET)
    folder = exported(drafter, TARGET, "dspark", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        load_pretrained(folder, TARGET)

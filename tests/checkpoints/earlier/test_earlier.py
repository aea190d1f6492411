"""Drafters that version 0.1 saved, before files and classes were renamed."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.export import export
from checkpoints.pretrained import load_pretrained
from configs.command_line.renamed import RENAMED, current_names
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from tests.fakes import tiny_target

SAVED = Path(__file__).parent / "saved_0_1"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
"""What that version's own code made of them on the same target."""


@pytest.mark.parametrize("name", EXPECTED)
def test_a_drafter_of_before_decodes_as_it_did(name: str) -> None:
    target = tiny_target(dtype=torch.float32)
    drafter = load_pretrained(SAVED / name, target)
    decoder = SpeculativeDecoder(target, drafter, budget=4)
    trace = decoder.decode([[7, 8, 9, 10, 11]], Sampling(), 24)[0]
    assert trace.ids == EXPECTED[name]["ids"]
    assert trace.accepted == EXPECTED[name]["accepted"]


def test_a_drafter_of_before_exports_the_same_bytes(tmp_path: Path) -> None:
    export(SAVED / "medusa", "medusa", tmp_path / "out", tiny_target(dtype=torch.float32))
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(tmp_path / "out" / "model.safetensors").items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == EXPECTED["medusa"]["export"]


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("modules.heads.medusa.Medusa", "modules.drafters.heads.medusa.Medusa"),
        ("modules.language_models.sorted.Sorted", "modules.drafters.small_models.s2d.S2D"),
        ("modules.trees.rerank.RerankedTree", "modules.trees.reranked.RerankedTree"),
        ("modules.headset.Medusa", "modules.headset.Medusa"),
        ("see modules.heads.medusa", "see modules.heads.medusa"),
    ],
)
def test_class_paths_of_before_are_brought_up_to_date(earlier: str, now: str) -> None:
    assert current_names({"rows": [{"class_path": earlier}]}) == {"rows": [{"class_path": now}]}


@pytest.mark.parametrize("name", sorted(set(RENAMED.values())))
def test_every_current_name_exists(name: str) -> None:
    module, _, last = name.rpartition(".")
    if last[0].isupper():
        assert isinstance(getattr(import_module(module), last), type)
    else:
        import_module(name)

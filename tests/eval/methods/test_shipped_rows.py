"""The shipped comparisons: every row can be built from the runs that their comments train, and is
lossless.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from checkpoints.export import export
from checkpoints.pretrained import Provenance, save_pretrained
from eval.methods.rows import Method, Row, build_rows
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.drafters.retrieval.suffix_array import Datastore
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.target.loading import load_target
from modules.target.target import Target
from modules.trees.named_trees import NAMED
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.test_style import ROOT

STUDIES = "docs/benchmarks"
EAGLES = {
    **{name: (Eagle, {}) for name in ("eagle", "eagle_s1", "eagle_s2", "eagle_int8")},
    **{name: (Fspad, {}) for name in ("fspad", "fspad_s1", "fspad_s2")},
    "fspad_nofs": (Fspad, {"feature_sampling": False}),
    "fspad_nopad": (Fspad, {"partial_alignment": False}),
    "eagle3": (Eagle3, {}),
    "eagle3_steps1": (Eagle3, {"steps": 1}),
    "eagle3_onelayer": (Eagle3, {"fused_layers": [1]}),
    "medusa": (Medusa, {"heads": 3}),
}
PROMPTS = [[7, 8, 9, 10], [20, 30], [40, 41, 42, 43, 44]]
FALCONS = {
    "2": {"block": 2},
    "3": {"block": 3},
    "4": {"block": 4},
    "no_glancing": {"glancing": 0.0},
    "unrevealed": {"revealed_loss": False},
    "no_lstm": {"lstm": False},
    "causal": {"relaxed_mask": False},
    "own_row": {"newest_row": False},
}
SORTED = {
    "s2d": {"exits": [2, 4, 6]},
    "s2d_plain": {"exits": [2, 4, 6], "sorted_training": False},
    **{f"s2d_{depth}": {"exits": [depth]} for depth in (2, 4, 6)},
}


def saved(folder: Path, name: str, drafter: Drafter, target: Target) -> None:
    torch.manual_seed(0)
    drafter.initialise(target)
    save_pretrained(drafter, folder / "runs" / name, Provenance.of(target))


def shipped(config: str, folder: Path, target: Target) -> dict[str, Row]:
    text = (ROOT / config).read_text()
    for key in ("drafter", "partner", "datastore"):
        text = text.replace(f"{key}: runs/", f"{key}: {folder}/runs/")
    methods = [Method(**row) for row in yaml.safe_load(text)["methods"]]
    for method in methods:
        method.check()
    return {row.name: row for row in build_rows(methods, target, Sampling())}


def all_lossless(rows: Mapping[str, Row]) -> None:
    """Every row gives the first one's tokens, and drafts."""
    answers = {name: row.decoder.decode(PROMPTS, Sampling(), 12) for name, row in rows.items()}
    plain = [trace.ids for trace in answers.pop("autoregressive")]
    for name, traces in answers.items():
        assert rows[name].claims_lossless and [trace.ids for trace in traces] == plain, name
        assert all(max(trace.nodes) >= 1 for trace in traces), name


def static_and_exact(rows: Mapping[str, Row], drafter: str, static: str, published: str) -> None:
    """The same weights with fixed nodes, which the paper's tree has too."""
    builder = rows[static].decoder.builder
    assert (
        isinstance(builder, StaticTree)
        and builder.depth == 4
        and len(builder.paths) == rows[static].budget == 7
    )
    assert all(list(path) in NAMED[published] for path in builder.paths)
    assert rows[static].decoder.drafter is rows[drafter].decoder.drafter


def test_falcon_of_every_block_and_ablation_beside_eagle(tmp_path: Path) -> None:
    target = tiny_target()
    saved(tmp_path, "falcon/eagle", Eagle(target.shape), target)
    for name, arguments in FALCONS.items():
        saved(tmp_path, f"falcon/{name}", Falcon(target.shape, **arguments), target)
    rows = shipped(f"{STUDIES}/falcon_xeon2_202611/methods.yaml", tmp_path, target)
    assert [rows[name].decoder.drafter.block for name in ("falcon_2", "falcon_3", "falcon_4")] == [
        2,
        3,
        4,
    ]
    drafting = [row for row in rows.values() if row.builder]
    assert {row.budget for row in drafting} == {7}
    assert all(
        row.decoder.builder.depth % getattr(row.decoder.drafter, "block", 1) == 0
        for row in drafting
    )
    assert {row.decoder.builder.depth for row in drafting if row.name != "falcon_3"} == {4}
    static_and_exact(rows, "falcon_2", "falcon_2_static", "falcon_8")
    all_lossless(rows)


def test_eagles_and_fspad_with_every_ablation_draft_the_same_kind_of_tree(tmp_path: Path) -> None:
    target = tiny_target()
    for name, (kind, arguments) in EAGLES.items():
        saved(tmp_path, f"bench/{name}", kind(target.shape, **arguments), target)
    rows = shipped(f"{STUDIES}/ablation_eagle_fspad_xeon2_202611/methods.yaml", tmp_path, target)
    assert set(rows) == {"autoregressive", *EAGLES, "eagle_static", "eagle_reranked"}
    assert {row.budget for row in rows.values() if row.builder} == {7}
    builders = [rows[name].decoder.builder for name in EAGLES if name != "medusa"]
    assert len({(type(one), one.depth, one.width, one.least) for one in builders}) == 1
    static_and_exact(rows, "eagle", "eagle_static", "eagle_25")
    assert rows["eagle_reranked"].decoder.builder.least == 0
    all_lossless(rows)


def test_one_sorted_drafter_serves_a_target_and_its_own_first_layers(tmp_path: Path) -> None:
    """The second target is made as the study's page says: the first layers, exported, and loaded as
    a target.
    """
    target = tiny_target(layers=6)
    for name, arguments in SORTED.items():
        saved(tmp_path, f"bench/{name}", S2D(target.shape, **arguments), target)
    saved(tmp_path, "healed", Independent(target.shape, layers=4), target)
    export(tmp_path / "runs" / "healed", "hf", tmp_path / "healed", target)
    smaller = load_target(str(tmp_path / "healed"), "float64")
    assert (
        smaller.shape.num_layers == 4
        and smaller.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    )
    assert smaller.fingerprint() != target.fingerprint()
    for one in (target, smaller):
        rows = shipped(f"{STUDIES}/s2d_two_targets_xeon2_202611/methods.yaml", tmp_path, one)
        all_lossless(rows)
        drafter = rows["exit_2"].decoder.drafter
        everything = sum(parameter.numel() for parameter in drafter.parameters())
        assert rows["exit_2"].drafter_parameters == everything - drafter.embedding.weight.numel(), (
            "its own weights"
        )
        assert rows["exit_2"].drafter_parameters > rows["alone_2"].drafter_parameters
        assert (
            rows["adaptive_tree"].decoder.drafter is drafter and rows["adaptive_tree"].budget == 7
        )
        assert (
            decoded(rows["exit_2"]) == decoded(rows["plain_exit_2"]) == decoded(rows["alone_2"])
        ), "untrained alike"


def decoded(row: Row) -> list[Any]:
    return [trace.accepted for trace in row.decoder.decode(PROMPTS, Sampling(), 12)]


def test_aligned_drafters_beside_distillation_alone(tmp_path: Path) -> None:
    target = tiny_target()
    for name, kind in (("clover", Clover), ("eagle", Eagle)):
        for suffix in ("", "_longer", "_aligned"):
            saved(tmp_path, name + suffix, kind(target.shape), target)
    rows = shipped(f"{STUDIES}/aligned_drafting_xeon2_202611/methods.yaml", tmp_path, target)
    assert len(rows) == 7 and len({row.budget for row in rows.values() if row.builder}) == 1
    all_lossless(rows)


def test_drawn_trees_fit_the_drafter_that_their_comment_trains(tmp_path: Path, monkeypatch) -> None:
    """Clover's three heads; which size pays is not asked here."""
    target = tiny_target()
    saved(tmp_path, "clover", Clover(target.shape, heads=3), target)
    monkeypatch.setattr("eval.methods.rows.automatic_budget", lambda *_: 6)
    rows = shipped("configs/eval/drawn_trees.yaml", tmp_path, target)
    assert len(rows) == 9 and rows["sequoia"].budget == 6
    all_lossless(rows)


def test_the_demos_rows_fuse_its_drafter_with_its_datastore(tmp_path: Path, monkeypatch) -> None:
    target = tiny_target()
    monkeypatch.setattr("eval.methods.rows.automatic_budget", lambda *_: 6)
    saved(tmp_path, "demo", Clover(target.shape), target)
    store = Datastore.build([[7, 8, 9, 10, 11, 12] * 3], target.shape.vocab_size)
    store.save(tmp_path / "runs" / "demo_datastore", "embedded")
    rows = shipped("configs/eval/demo.yaml", tmp_path, target)
    fused = rows["rasd_clover"].decoder.drafter
    assert isinstance(fused.partner, Clover) and fused.rest is not None
    assert {row.budget for row in rows.values() if row.builder} == {6}
    all_lossless({name: row for name, row in rows.items() if row.builder or row.budget == 0})

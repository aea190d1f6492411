"""Folders of strangers: what no component can be is refused in a line, before memory is taken for
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.checks import check_arguments
from checkpoints.pretrained import (
    Provenance,
    load_pretrained,
    save_pretrained,
    trainable_class,
    warm_start,
)
from modules.contracts.trainable import MOST, Trainable
from modules.drafters.feature.eagle import Eagle
from modules.drafters.heads.medusa import Medusa
from modules.drafters.small_models.independent import Independent
from modules.target.target import Target
from modules.trees.static import MOST_PATHS, StaticTree
from tests.fakes import tiny_target
from train.cli import command

DEEP = 100_000
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.float32)


def saved(target: Target, folder: Path, **arguments: Any) -> Path:
    settings = {"heads": 2, "draft_vocabulary": 48, **arguments}
    return save_pretrained(
        Medusa(target.shape, **settings), folder / "drafter", Provenance.of(target)
    )


def put(folder: Path, place: str, value: Any, file: str = "config.json") -> None:
    """Set one value of a JSON file, `place` is its keys with dots between them."""
    config = json.loads((folder / file).read_text())
    *outer, last = place.split(".")
    inner = config
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (folder / file).write_text(json.dumps(config))


def refusal(load: Callable[[], Any]) -> str:
    """The one line of a refusal."""
    with pytest.raises(ValueError) as caught:
        load()
    said = str(caught.value)
    print(said)
    assert "\n" not in said and len(said) < 1500
    return said


SIZES = [
    ("arguments.heads", 10**9),
    ("arguments.heads", 100_000),
    ("arguments.heads", -1),
    ("arguments.blocks", 10**9),
    ("arguments.tree", [[0]] * 200_000),
    ("arguments.tree", [[-1]]),
    ("arguments.tree", [[10**9]]),
    ("arguments.tree", [[100]]),
    ("arguments.tree", [[0] * 100_000]),
    ("arguments.tree", "optimised_1000000000"),
    ("arguments.draft_vocabulary", 10**12),
    ("arguments.draft_vocabulary", 0),
    ("target.shape.hidden_size", 10**9),
    ("target.shape.hidden_size", -1),
    ("target.shape.hidden_size", 33),
    ("target.shape.vocab_size", 10**12),
    ("target.shape.num_layers", 10**5),
    ("target.shape.num_heads", 0),
    ("target.shape.max_positions", 10**15),
    ("target.shape.intermediate_size", 10**9),
]
TYPES = [
    (key, value)
    for key in (
        "drafter_type",
        "class",
        "format_version",
        "arguments",
        "target",
        "target.name",
        "target.fingerprint",
        "target.shape",
        "target.shape.hidden_size",
        "target.shape.norm_eps",
        "target.shape.activation",
        "target.shape.rope",
        "target.shape.qk_norm",
        "arguments.heads",
        "arguments.tree",
        "arguments.lm_head",
        "arguments.decay",
    )
    for value in ([], [{}], {"a": 1}, "x" * 9, True, 0.5, -3)
]
ALLOWED = {
    ("target.name", str),
    ("target.fingerprint", str),
    ("arguments.decay", float),
    ("arguments.decay", int),
    ("target.shape.qk_norm", bool),
    ("target.shape.norm_eps", float),
    ("arguments", dict),
    ("arguments.tree", list),
    ("target.shape.rope", dict),
}


@pytest.mark.parametrize(("place", "value"), SIZES, ids=lambda value: str(value)[:20])
def test_absurd_sizes_are_refused_before_anything_is_built(
    place: str, value: Any, target: Target, tmp_path: Path
) -> None:
    folder = saved(target, tmp_path)
    put(folder, place, value)
    refusal(lambda: load_pretrained(folder, target))


@pytest.mark.parametrize(
    ("place", "value"),
    [one for one in TYPES if (one[0], type(one[1])) not in ALLOWED],
    ids=lambda value: str(value)[:20],
)
def test_values_of_wrong_types_are_refused(
    place: str, value: Any, target: Target, tmp_path: Path
) -> None:
    folder = saved(target, tmp_path)
    put(folder, place, value)
    refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "eagle"),
        ("arguments.unknown", 1),
        ("target.shape.unknown", 1),
        ("arguments.decay", float("nan")),
        ("target.shape.norm_eps", float("inf")),
        ("target.shape.activation", "exec"),
        ("arguments.tree", [[[0]]]),
        ("arguments.tree", [["0"]]),
        ("target.shape.rope", {"rope_theta": [[[[[[[[[[1]]]]]]]]]]}),
        ("arguments.lm_head", "x" * 10**6),
    ],
)
def test_values_that_mean_nothing_are_refused(
    place: str, value: Any, target: Target, tmp_path: Path
) -> None:
    folder = saved(target, tmp_path)
    put(folder, place, value)
    refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize(
    "text",
    [
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "null",
        "[]",
        "",
        "NaN",
        '{"a": ' + "9" * 10_000 + "}",
    ],
    ids=lambda text: text[:6],
)
@pytest.mark.parametrize("file", ["config.json", "provenance.json"])
def test_files_that_are_no_objects_are_refused(
    text: str, file: str, target: Target, tmp_path: Path
) -> None:
    folder = saved(target, tmp_path)
    (folder / file).write_text(text)
    said = refusal(lambda: (Provenance.read(folder / file), load_pretrained(folder)))
    assert file in said


@pytest.mark.parametrize("file", ["config.json", "provenance.json", WEIGHTS])
def test_links_to_what_cannot_be_read_are_refused(
    file: str, target: Target, tmp_path: Path
) -> None:
    folder = saved(target, tmp_path)
    (folder / file).unlink()
    (folder / file).symlink_to("/proc/self/mem" if Path("/proc/self/mem").exists() else "/dev")
    assert file in refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("target", 5),
        ("target", {}),
        ("target.name", 5),
        ("created", 5),
        ("created", "yesterday"),
        ("data", []),
        ("measured", {"val/loss": "x"}),
        ("measured", []),
        ("packages", {"torch": {}}),
        ("settings", "x"),
        ("command", ["rm"]),
        ("git_revision", {}),
        ("unknown", 1),
    ],
)
def test_provenance_of_wrong_types_is_refused(
    place: str, value: Any, target: Target, tmp_path: Path
) -> None:
    file = saved(target, tmp_path) / "provenance.json"
    put(file.parent, place, value, file.name)
    assert "provenance" in refusal(lambda: Provenance.read(file))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "exec", "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "default", "rope_theta": []},
        {"rope_type": "default", "rope_theta": 0.0},
    ],
)
def test_rotary_parameters_that_mean_nothing_are_refused(
    rope: dict[str, Any], target: Target, tmp_path: Path
) -> None:
    drafter = Eagle(target.shape, draft_vocabulary=48)
    folder = save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    assert load_pretrained(folder, target)
    put(folder, "target.shape.rope", rope)
    refusal(lambda: load_pretrained(folder, target))


def bad_weights(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the right names, of which one is bad."""
    first = next(key for key in tensors if key != "vocabulary")
    whole, ids = tensors[first], tensors["vocabulary"].clone()
    if name == "large":
        ids[-1] = 10**9
    elif name == "negative":
        ids[0] = -5
    elif name == "twice":
        ids[1] = ids[0]
    changed = {
        "nan": {first: whole.masked_fill(torch.ones_like(whole, dtype=torch.bool), float("nan"))},
        "inf": {first: whole + float("inf")},
        "complex": {first: whole.to(torch.complex64)},
        "int8": {first: whole.to(torch.int8)},
        "bool": {first: whole.bool()},
        "float8": {first: whole.to(torch.float8_e4m3fn)},
        "float ids": {"vocabulary": ids.float()},
        "large": {"vocabulary": ids},
        "negative": {"vocabulary": ids},
        "twice": {"vocabulary": ids},
        "reshaped": {first: whole[:1]},
        "more": {"x": whole.clone()},
    }
    return {**tensors, **changed[name]}


@pytest.mark.parametrize(
    "name",
    [
        "nan",
        "inf",
        "complex",
        "int8",
        "bool",
        "float8",
        "float ids",
        "large",
        "negative",
        "twice",
        "reshaped",
        "more",
    ],
)
def test_weights_that_cannot_draft_are_refused(name: str, target: Target, tmp_path: Path) -> None:
    folder = saved(target, tmp_path)
    save_file(bad_weights(name, load_file(folder / WEIGHTS)), folder / WEIGHTS, {"aliases": "{}"})
    assert WEIGHTS in refusal(lambda: load_pretrained(folder, target))
    if name in ("nan", "large"):
        refusal(lambda: warm_start(Medusa(target.shape, heads=2, draft_vocabulary=48), folder))


@pytest.mark.parametrize("aliases", ["[]", "5", '{"a": 5}', "[" * DEEP, '{"a": "nowhere"}', "x"])
def test_hostile_aliases_are_refused(aliases: str, target: Target, tmp_path: Path) -> None:
    folder = saved(target, tmp_path)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"aliases": aliases})
    assert WEIGHTS in refusal(lambda: load_pretrained(folder, target))


def test_a_language_model_of_a_hundred_thousand_layers_is_not_begun(
    target: Target, tmp_path: Path
) -> None:
    drafter = Independent(target.shape, layers=1)
    drafter.initialise(target)
    folder = save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    put(folder, "arguments.model.num_hidden_layers", 10**5)
    assert "layers" in refusal(lambda: load_pretrained(folder))
    put(folder, "arguments.model.num_hidden_layers", 1)
    put(folder, "arguments.model.intermediate_size", 10**9)
    assert "reshaped" in refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize("flag", ["--drafter.heads=1000000000", "--drafter.heads=65"])
def test_a_plan_of_too_many_heads_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"heads must be at most {MOST['heads']}"):
        command(["--config", "clover.yaml", flag, "--plan"])


def test_trees_have_bounds() -> None:
    assert len(StaticTree([(rank,) for rank in range(MOST_PATHS)]).paths) == MOST_PATHS
    for paths in ([(rank,) for rank in range(MOST_PATHS + 1)], [(MOST_PATHS,)], [(-1,)], [()]):
        with pytest.raises(ValueError, match="tree"):
            StaticTree(paths)


@pytest.mark.parametrize("positions", [0, -1, 10**30])
def test_a_language_model_of_absurd_length_is_refused(
    positions: int, target: Target, tmp_path: Path
) -> None:
    drafter = Independent(target.shape, layers=1)
    drafter.initialise(target)
    folder = save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    put(folder, "arguments.model.max_position_embeddings", positions)
    assert f"has {positions} positions" in refusal(lambda: load_pretrained(folder, target))


@pytest.mark.parametrize(
    ("drafter_type", "kind", "argument"),
    [
        ("independent", "Independent", "model"),
        ("rest", "Rest", "datastore"),
        ("rasd", "Rasd", "datastore"),
        ("aded", "Aded", "datastore"),
        ("suffix_automaton", "Suffix", "datastore"),
    ],
)
def test_a_folder_does_not_say_what_is_read_or_downloaded(
    drafter_type: str, kind: str, argument: str, target: Target, tmp_path: Path
) -> None:
    folder = saved(target, tmp_path)
    for key, value in {
        "drafter_type": drafter_type,
        "class": kind,
        "arguments": {argument: "somebody/something"},
    }.items():
        put(folder, key, value)
    said = refusal(lambda: load_pretrained(folder, target))
    assert f"arguments.{argument} names 'somebody/something'" in said


def every_class(kind: type[Trainable] = Trainable) -> list[type[Trainable]]:
    found = [each for each in kind.__subclasses__() if each.__module__.startswith("modules.")]
    return found + [inner for each in found for inner in every_class(each)]


def test_the_types_of_every_components_arguments_are_known() -> None:
    for name in ("Medusa2", "Clover2", "Hydra", "Falcon", "Fspad", "Eagle3", "S2D", "Judge"):
        check_arguments(trainable_class(name.lower(), name), {}, "x")
    for kind in set(every_class()):
        check_arguments(kind, {}, kind.__name__)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blocks": -1}, "blocks must not be negative, got -1"),
        ({"heads": -1}, "heads must not be negative, got -1"),
        ({"decay": float("nan")}, "decay must be finite, got nan"),
        ({"decay": float("inf")}, "decay must be finite, got inf"),
    ],
)
def test_numbers_that_no_component_has_are_refused(
    arguments: dict[str, Any], words: str, target: Target
) -> None:
    with pytest.raises(ValueError, match=words):
        Medusa(target.shape, **arguments)

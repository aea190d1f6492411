"""A repository with an engine's files beside ours: the engine reads it, and so do we."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from checkpoints.card import suggested_name
from checkpoints.formats.known import format_of
from checkpoints.hub import publication, publish, write
from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from checkpoints.publish import command
from configs.command_line.loading import run as one_line_run
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.medusa import Medusa
from modules.target.target import Target
from tests.checkpoints import engines
from tests.checkpoints.hub_server import card_errors
from tests.checkpoints.test_exports import DRAFTED, LAYERS, agrees, shaken
from tests.fakes import tiny_target

REPO = "ada/llama-eagle3"
OURS = {f"slipstream/{name}" for name in ("config.json", "model.safetensors", "provenance.json")}
WHOLE = {".gitattributes", "README.md", "config.json", "model.safetensors", *OURS}
PLAIN = {".gitattributes", "README.md", "config.json", "model.safetensors", "provenance.json"}


@pytest.fixture(scope="module")
def eight() -> Target:
    return tiny_target(layers=LAYERS)


@pytest.fixture
def run(eight: Target, tmp_path: Path) -> Path:
    drafter = shaken(Eagle3(eight.shape, DRAFTED), eight)
    data = {"train": ["HuggingFaceH4/ultrachat_200k@main", "/home/alice/x.jsonl", "a/b.jsonl"]}
    provenance = Provenance.of(eight, data=data)
    return save_pretrained(drafter, tmp_path / "run" / "drafter", provenance).parent


def test_an_engine_and_this_project_read_the_same_repository(hub, run, eight) -> None:
    publish(run, REPO, form="speculators", target=eight)
    assert set(hub.repositories[REPO].files) == WHOLE
    ours = load_pretrained(run, eight)
    again = load_pretrained(REPO, eight)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert isinstance(again, Eagle3) and again.vocabulary_D is not None


def test_the_files_at_the_top_are_the_engines(run, eight, tmp_path) -> None:
    made = publication(run, REPO, form="speculators", target=eight)
    write(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert format_of(config) == "speculators"
    drafter = load_pretrained(run, eight)
    assert isinstance(drafter, Eagle3)
    for path in (tmp_path / "out" / "slipstream", tmp_path / "out" / "README.md"):
        path.rename(tmp_path / path.name)
    agrees(engines.VllmSpeculators(tmp_path / "out", LAYERS), drafter, eight)


def test_publishing_in_another_way_leaves_nothing_of_the_earlier_one(hub, run, eight) -> None:
    for form, files in (("speculators", WHOLE), (None, PLAIN), ("speculators", WHOLE)):
        publish(run, REPO, form=form, target=eight)
        assert set(hub.repositories[REPO].files) == files
        assert isinstance(load_pretrained(REPO, eight), Eagle3)


@pytest.mark.parametrize(("name", "alone"), [("ada/llama", True), ("/home/alice/llama", False)])
def test_the_card_serves_the_repository_as_it_is(run, eight, monkeypatch, name, alone) -> None:
    config = run / "drafter" / "config.json"
    config.write_text(config.read_text().replace("tiny-llama", name))
    provenance = run / "drafter" / "provenance.json"
    provenance.write_text(provenance.read_text().replace("tiny-llama", name))
    monkeypatch.setattr(eight, "name", name)
    made = publication(run, REPO, form="speculators", target=eight)
    card = bytes(made.files["README.md"]).decode()
    assert card_errors(card) == []
    assert (f"    vllm serve {REPO}\n" in card) == alone
    assert f'"model": "{REPO}", "num_speculative_tokens"' in card
    assert all(b"alice" not in made.files[file] for file in made.files if file.endswith(".json"))
    assert "alice" not in card


def test_metadata_as_others_search_it(run) -> None:
    data = ModelCard(bytes(publication(run, REPO).files["README.md"]).decode()).data
    assert data.tags == [
        "slipstream",
        "speculative-decoding",
        "draft-model",
        "eagle3",
        "vllm",
        "sglang",
        "arxiv:2503.01840",
        "arxiv:2605.09992",
    ]
    assert data.datasets == ["HuggingFaceH4/ultrachat_200k"]
    plain = Medusa(tiny_target().shape)
    other = Provenance.of(tiny_target(), data={"train": "embedded"})
    save_pretrained(plain, run / "drafter", replace(other, measured={}))
    data = ModelCard(bytes(publication(run, REPO).files["README.md"]).decode()).data
    assert "arxiv:2401.10774" in data.tags and "sglang" not in data.tags and not data.datasets


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct-Eagle3"),
        ("smollm2-135m", "SmolLM2-135M-Instruct-Eagle3"),
        (r"C:\Users\al\My Llama\\", "My-Llama-Eagle3"),
        ("/home/al/x.gguf", "x-Eagle3"),
        ("ada/" + "x" * 200, "x" * 89 + "-Eagle3"),
        ("ada/x-.-y.", "x-y.Eagle3"),
    ],
)
def test_suggested_names(target: str, name: str) -> None:
    assert suggested_name("Eagle3", target) == name and len(name) <= 96


def test_a_user_alone_gets_the_suggested_name(hub, run, capsys) -> None:
    assert command([str(run), "--repo", "ada"]) == 0
    assert set(hub.repositories) == {"ada/tiny-llama-Eagle3"}
    assert command([str(run), "--output", str(run / "out")]) == 0
    assert "USER/tiny-llama-Eagle3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "medusa"], "--format medusa holds no Eagle3: use speculators or sglang"),
        (["--target", "x"], "--target is only read with --format"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(hub, run, capsys, flags, words) -> None:
    assert one_line_run(command, [str(run), "--repo", REPO, *flags]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and hub.asked == []

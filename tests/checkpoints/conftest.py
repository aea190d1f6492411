"""A local Hub that the real client talks to, and a trained drafter to publish on it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from checkpoints.pretrained import Provenance, save_pretrained
from eval import evaluation
from eval.evaluation import Evaluation, evaluate
from eval.methods.rows import Method
from modules.drafters.heads.medusa import Medusa
from modules.target.target import Target
from tests.checkpoints.hub_server import Hub
from tests.fakes import tiny_target
from tests.ports import serving

TOKEN = "hf_" + "NeverToBeSeenAnywhere" * 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The real client is logged in here, with an empty cache; its waits between retries are left
    out.
    """
    server = Hub(TOKEN)
    serving(server)
    home = tmp_path / "huggingface"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    yield server
    server.close()
    close_session()


@pytest.fixture(scope="session")
def target() -> Target:
    """What the drafter was trained for."""
    return tiny_target()


def save(folder: Path, target: Target, seed: int = 0) -> Medusa:
    """A run folder with Medusa heads far from their beginnings."""
    torch.manual_seed(seed)
    drafter = Medusa(target.shape, heads=2).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    measured = {"probe/tau": 1.25 + seed, "val/loss": 3.5}
    save_pretrained(
        drafter,
        folder / "drafter",
        Provenance.of(target, measured=measured, data={"train": "embedded"}),
    )
    return drafter.eval()


@pytest.fixture
def trained(tmp_path: Path, target: Target) -> Path:
    """A run with a drafter, not yet evaluated."""
    save(tmp_path / "runs" / "heads", target)
    return tmp_path / "runs" / "heads"


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Path:
    """A run with a report that the harness made, greedy and sampled; tests change copies of it."""
    run = tmp_path_factory.mktemp("measured") / "runs" / "heads"
    save(run, target)
    prompts = run.parent / "questions.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"id": i, "category": "ab"[i % 2], "turns": [f"question {i}"]}) + "\n"
            for i in range(4)
        )
    )
    other = Method(
        name="lookup",
        drafter={"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"},
    )
    asked = Evaluation(
        drafters=[str(run)],
        methods=[other],
        prompts=[str(prompts)],
        max_new_tokens=12,
        temperature=[0.0, 1.0],
        dtype="float64",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_target", lambda *_: target)
        evaluate(asked, run / "eval")
    return run


@pytest.fixture
def evaluated(tmp_path: Path, measured: Path) -> Path:
    """A copy of the run with a report, with the times of its files."""
    shutil.copytree(measured.parent, tmp_path / "runs")
    return tmp_path / "runs" / measured.name

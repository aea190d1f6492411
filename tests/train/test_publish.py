"""A training config with a `publish:` section: checked before training, published after it."""

import json

import pytest

from checkpoints.pretrained import load_pretrained
from configs.command_line.loading import run as one_line_run
from tests.checkpoints.conftest import TOKEN, hub  # noqa: F401
from train.cli import command

REPO = "ada/tiny"


def run(recipe, output, *more):
    return one_line_run(command, ["--config", str(recipe), "--output", str(output), *more])


def test_a_run_is_published_when_it_has_ended(tiny, recipe, tmp_path, hub, capsys):  # noqa: F811
    recipe.write_text(recipe.read_text() + f"publish: {{repo: {REPO}, license: mit}}\n")
    assert run(recipe, tmp_path / "run") == 0
    told = capsys.readouterr()
    assert f"published: {hub.url}/{REPO}/commit/" in told.out and TOKEN not in told.out + told.err
    assert hub.repositories[REPO].private
    downloaded, local = (
        load_pretrained(REPO, tiny).state_dict(),
        load_pretrained(tmp_path / "run", tiny).state_dict(),
    )
    assert all(bool((downloaded[name] == tensor).all()) for name, tensor in local.items())
    assert b"license: mit" in hub.repositories[REPO].files["README.md"]
    provenance = json.loads(hub.repositories[REPO].files["provenance.json"])
    assert provenance["settings"]["publish"] == {"repo": REPO, "private": True, "license": "mit"}


def test_a_failure_after_training_keeps_the_run_and_says_how_to_publish_it(
    tiny, recipe, tmp_path, hub, capsys
):  # noqa: F811
    hub.trouble = {"commit": 503}
    assert run(recipe, tmp_path / "run", "--publish.repo", REPO, "--publish.private", "false") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ada/tiny could not be published: the Hub is in trouble")
    assert f"python -m checkpoints.publish {tmp_path / 'run'} --repo {REPO} --public" in told
    assert hub.repositories == {} and load_pretrained(tmp_path / "run", tiny).heads == 2


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("tiny", TOKEN, "repo 'tiny' is not the id of a Hub repository: give USER/NAME"),
        (REPO, "", "there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_mistakes_are_seen_before_training(
    recipe, tmp_path, hub, monkeypatch, capsys, repo, token, words
):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("train.run.load_target", lambda *_: pytest.fail("a target was loaded"))
    assert run(recipe, tmp_path / "run", "--publish.repo", repo) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists() and hub.asked == []

"""Publishing with the real client to a Hub of the tests' own: what arrives, what failures leave,
what stays secret.
"""

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import cast

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from checkpoints import hub as hub_module
from checkpoints.hub import check_repo, check_token, publish
from checkpoints.pretrained import load_pretrained
from checkpoints.publish import command
from configs.command_line.loading import run as one_line_run
from configs.command_line.redaction import portable
from modules.contracts.drafter import Context, Drafter
from modules.target.target import Target
from modules.trees.static import StaticTree
from tests.checkpoints.conftest import TOKEN, save
from tests.checkpoints.hub_server import Hub, Repository

REPO = "ada/heads"
FILES = {".gitattributes", "README.md", "config.json", "model.safetensors", "provenance.json"}


def drafts(drafter: Drafter, target: Target) -> tuple[list[list[int]], torch.Tensor]:
    """The tree drafted after a prompt, and the logits of its first step."""
    prompt, lengths = torch.tensor([[7, 8, 9, 10, 11, 40]]), torch.tensor([6])
    session = target.open(1, 64)
    _, states = session.prefill(prompt, lengths, drafter.decoding_states)
    with torch.no_grad():
        state = drafter.start(Context(target, prompt, lengths, torch.tensor([3]), states))
        tree = StaticTree([[0], [1], [0, 0], [0, 1], [1, 0]]).build(drafter, state, 5)
    return tree.tokens_BN.tolist(), tree.topology.parents_BN


# -- what arrives ----------------------------------------------------------------------------------


def test_what_is_published_downloads_into_an_empty_cache_and_drafts_the_same(
    hub, trained, target, capsys
) -> None:
    assert command([str(trained), "--repo", REPO]) == 0
    repository = hub.repositories[REPO]
    assert f"published: {hub.url}/{REPO}/commit/{repository.head}" in capsys.readouterr().out
    assert repository.private and set(repository.files) == FILES and len(repository.commits) == 2
    assert (
        hub.asked.index("validate")
        < hub.asked.index("create")
        < hub.asked.index("put")
        < hub.asked.index("commit")
    )
    assert not Path(constants.HF_HUB_CACHE).exists()
    local, downloaded = load_pretrained(trained, target), load_pretrained(REPO, target)
    state = downloaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in local.state_dict().items())
    (tokens, parents), (same_tokens, same_parents) = (
        drafts(cast(Drafter, each), target) for each in (local, downloaded)
    )
    assert tokens == same_tokens and torch.equal(parents, same_parents)
    assert load_pretrained(f"{REPO}@{repository.head}", target).arguments == local.arguments


def test_a_report_comes_along_and_leaves_in_the_same_commit_when_it_holds_no_more(
    hub, evaluated, target
) -> None:
    command([str(evaluated), "--repo", REPO])
    assert json.loads(hub.repositories[REPO].files["report.json"]) == json.loads(
        json.dumps(portable(json.loads((evaluated / "eval" / "report.json").read_text())))
    )
    save(evaluated, target, seed=1)
    assert one_line_run(command, [str(evaluated), "--repo", REPO]) == 2
    command([str(evaluated), "--repo", REPO, "--report", "none"])
    assert set(hub.repositories[REPO].files) == FILES and len(hub.repositories[REPO].commits) == 3
    assert b"report.json" not in hub.repositories[REPO].files["README.md"]


def test_publishing_the_same_again_changes_nothing(hub, trained) -> None:
    first = publish(trained, REPO)
    assert publish(trained, REPO) == first and len(hub.repositories[REPO].commits) == 2


def test_visibility_is_chosen_once_and_never_changed_in_passing(hub, trained, target) -> None:
    command([str(trained), "--repo", "ada/open", "--public"])
    command([str(trained), "--repo", "ada/closed", "--private"])
    assert not hub.repositories["ada/open"].private and hub.repositories["ada/closed"].private
    save(trained, target, seed=1)
    before = hub.repositories["ada/open"].head
    with pytest.raises(
        ValueError, match="ada/open could not be published: it is there and public, .* add --public"
    ):
        publish(trained, "ada/open")
    with pytest.raises(
        ValueError, match="ada/closed could not be published: it is there and private"
    ):
        publish(trained, "ada/closed", private=False)
    assert (
        hub.repositories["ada/open"].head == before
        and len(hub.repositories["ada/closed"].commits) == 2
    )


def test_without_a_hub_the_same_files_are_written_to_a_folder(
    trained, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "published"
    assert command([str(trained), "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == FILES - {".gitattributes"}
    assert f'load_pretrained("{folder.name}", target)' in (folder / "README.md").read_text()
    assert load_pretrained(folder).heads == 2
    with pytest.raises(ValueError, match="exists: give a new folder"):
        command([str(trained), "--output", str(folder)])


# -- failures --------------------------------------------------------------------------------------

FAILURES = [
    (stage, trouble, words)
    for trouble, words in (
        (401, "the token was refused"),
        (403, "the token may not do this"),
        (409, "somebody else"),
        (503, "the Hub is in trouble"),
        ("hang", "no answer within 0.3"),
        ("cut", "disconnected|reset|broken pipe|closed|Error"),
    )
    for stage in ("validate", "create", "preupload", "batch", "put", "commit")
    if (stage, trouble) != ("create", 409)
]


@pytest.mark.parametrize(("stage", "trouble", "words"), FAILURES)
def test_a_failure_leaves_nothing_and_can_be_retried(
    hub, trained, monkeypatch, stage, trouble, words
) -> None:
    hub.trouble = {stage: trouble}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"(?i){words}") as caught:
        patch.setattr(hub_module, "TIMEOUT", 0.3 if trouble == "hang" else 60.0)
        publish(trained, REPO)
    assert "\n" not in str(caught.value) and "publishing again is safe" in str(caught.value)
    assert REPO not in hub.repositories
    hub.trouble = {}
    publish(trained, REPO)
    assert set(hub.repositories[REPO].files) == FILES and len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize(
    ("stage", "trouble"),
    [
        ("info", 503),
        ("info", "hang"),
        ("preupload", 401),
        ("put", 503),
        ("put", "cut"),
        ("commit", 403),
        ("commit", 409),
        ("commit", 500),
        ("commit", "hang"),
    ],
)
def test_a_failure_leaves_what_was_published_before(
    hub, trained, target, monkeypatch, stage, trouble
) -> None:
    publish(trained, REPO)
    head, before = hub.repositories[REPO].head, dict(hub.repositories[REPO].files)
    save(trained, target, seed=1)
    hub.trouble = {stage: trouble}
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="What was there is unchanged"),
    ):
        patch.setattr(hub_module, "TIMEOUT", 0.3 if trouble == "hang" else 60.0)
        publish(trained, REPO)
    assert (hub.repositories[REPO].head, hub.repositories[REPO].files) == (head, before)
    hub.trouble = {}
    publish(trained, REPO)
    assert len(hub.repositories[REPO].commits) == 3
    assert hub.repositories[REPO].files["model.safetensors"] != before["model.safetensors"]


def test_an_interrupted_upload_cleans_up_too(hub, trained, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("huggingface_hub.lfs._upload_single_part", interrupt)
        publish(trained, REPO)
    assert REPO not in hub.repositories
    publish(trained, REPO)


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("create", "What was there is unchanged, unless only the answer was lost"),
        ("commit", "The commit had arrived, only the answer was lost"),
    ],
)
def test_a_lost_answer_is_told_and_publishing_again_is_safe(hub, trained, stage, left) -> None:
    hub.trouble = {"lost": stage}
    with pytest.raises(ValueError, match=left):
        publish(trained, REPO)
    hub.trouble = {}
    publish(trained, REPO)
    assert set(hub.repositories[REPO].files) == FILES and len(hub.repositories[REPO].commits) == 2


def test_a_repository_that_cannot_be_deleted_again_is_named(hub, trained) -> None:
    hub.trouble = {"put": 500, "delete": 503}
    with pytest.raises(
        ValueError, match=r"still there, empty, as it could not be deleted \(the Hub is in trouble"
    ):
        publish(trained, REPO)
    assert set(hub.repositories[REPO].files) == {".gitattributes"}
    hub.trouble = {}
    publish(trained, REPO)
    assert set(hub.repositories[REPO].files) == FILES


def test_a_hub_that_is_not_there_or_stores_otherwise_is_a_failure_like_any_other(
    hub, trained, monkeypatch
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="not be published: .*xet.*Nothing is left"),
    ):
        patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        publish(trained, REPO)
    assert hub.repositories == {}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="offline mode is enabled"):
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        publish(trained, REPO)
    hub.close()
    close_session()
    with pytest.raises(ValueError, match="could not be published: ConnectError: .*refused"):
        publish(trained, REPO)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"put": 500, "info": "hang"}, r"could not be deleted \(no answer within 0.3 seconds"),
        ({"create": 403, "info": "hang"}, "no answer within 0.3 seconds"),
    ],
)
def test_a_hub_that_does_not_say_what_is_there_is_given_up(
    hub, trained, monkeypatch, trouble, words
) -> None:
    """That request has a limit of its own: the session's does not count for it."""
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.3)
    hub.trouble, begun = trouble, time.monotonic()
    with pytest.raises(ValueError, match=words) as caught:
        publish(trained, REPO)
    assert "\n" not in str(caught.value) and time.monotonic() - begun < 5


@pytest.mark.parametrize("stage", ["info", "tree"])
def test_a_download_from_a_hub_that_never_answers_is_given_up(
    hub, trained, target, monkeypatch, stage
) -> None:
    publish(trained, REPO)
    del hub.repositories[REPO].files["model.safetensors"]
    monkeypatch.setattr("checkpoints.pretrained.HUB_SECONDS", 0.3)
    hub.trouble = {stage: "hang"}
    with pytest.raises(ValueError, match="neither a folder here nor a reachable") as caught:
        load_pretrained(REPO, target)
    assert "\n" not in str(caught.value)


def test_one_failure_of_storage_is_tried_again_by_the_client(hub, trained, monkeypatch) -> None:
    hub.trouble = {"put": 503}
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: hub.trouble.clear())
    publish(trained, REPO)
    assert hub.asked.count("put") == 2 and set(hub.repositories[REPO].files) == FILES


def test_a_name_of_somebody_else_is_refused_with_nothing_uploaded(hub, trained) -> None:
    with pytest.raises(
        ValueError,
        match=r"grace/heads could not be published: the token may not do this.*namespace",
    ):
        publish(trained, "grace/heads")
    assert hub.storage == {} and hub.repositories == {}


def test_a_card_that_the_hub_finds_invalid_is_refused_before_anything_is_created(
    hub, trained
) -> None:
    with pytest.raises(ValueError, match="license.* must be one of"):
        publish(trained, REPO, license="mine")
    assert hub.asked == ["validate"]


# -- mistakes, before anything is sent -------------------------------------------------------------


@pytest.mark.parametrize(
    "repo", ["heads", "a/b/c", "ada/he ads", "ada/--", "/heads", "ada/", "ada/x.git", "../heads"]
)
def test_what_is_no_id_is_refused(hub, trained, repo) -> None:
    with pytest.raises(ValueError, match="is not the id of a Hub repository: give USER/NAME"):
        publish(trained, repo)
    with pytest.raises(ValueError):
        check_repo(repo)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN"], "give --repo USER/NAME to publish, or --output"),
        (
            ["RUN", "--repo", REPO, "--public", "--private"],
            "--public and --private contradict each other",
        ),
        (
            ["RUN", "--repo", REPO, "--report", "nowhere.json"],
            "report 'nowhere.json' does not exist",
        ),
        (["nowhere", "--repo", REPO], "run 'nowhere' does not exist"),
        (["RUN/..", "--repo", REPO], "holds no trained component"),
    ],
)
def test_mistakes_are_one_line(hub, trained, capsys, arguments, words) -> None:
    assert one_line_run(command, [word.replace("RUN", str(trained)) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and hub.asked == []


def test_a_damaged_run_is_refused(hub, trained) -> None:
    provenance = trained / "drafter" / "provenance.json"
    text = provenance.read_text()
    for damage, words in (
        ("{}", "is no provenance"),
        ("[", "is no provenance"),
        (None, "does not exist"),
    ):
        provenance.unlink() if damage is None else provenance.write_text(damage)
        with pytest.raises(ValueError, match=words):
            publish(trained, REPO)
    provenance.write_text(text)
    weights = trained / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        publish(trained, REPO)
    assert hub.asked == []


# -- the token -------------------------------------------------------------------------------------


def test_the_token_comes_from_the_standard_places_only(hub, trained, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ValueError,
        match="there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN",
    ):
        publish(trained, REPO)
    assert hub.asked == []
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN + "\n")
    check_token()
    publish(trained, REPO)
    assert set(hub.repositories[REPO].files) == FILES
    with pytest.raises(SystemExit):
        command([str(trained), "--repo", REPO, "--token", TOKEN, "--help"])


@pytest.mark.parametrize(
    "trouble",
    [
        {},
        {"validate": 403},
        {"create": 403},
        {"preupload": 403},
        {"put": 403},
        {"commit": 403},
        {"commit": "cut"},
        {"commit": 503, "delete": 503},
    ],
)
def test_the_token_is_in_no_output_log_message_or_traceback(
    hub, trained, monkeypatch, caplog, capfd, trouble
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    hub.trouble = trouble
    told = ""
    try:
        command([str(trained), "--repo", REPO])
    except ValueError as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        told = "".join(shown.format(chain=True))
        assert error.__context__ is None and error.__cause__ is None
    assert bool(told) == bool(trouble)
    out, err = capfd.readouterr()
    assert all(TOKEN not in text for text in (told, caplog.text, out, err))
    assert all(
        TOKEN.encode() not in content
        for repository in hub.repositories.values()
        for files in repository.commits.values()
        for content in files.values()
    )
    if "preupload" in trouble:
        assert "trouble on purpose for Bearer <redacted>" in told


def test_a_token_in_the_provenance_is_not_published(hub, trained, capsys) -> None:
    provenance = trained / "drafter" / "provenance.json"
    values = json.loads(provenance.read_text())
    for secret in (TOKEN, "hf_" + "SomebodyElsesToken0123"):
        provenance.write_text(json.dumps({**values, "command": f"python train.py --key {secret}"}))
        assert one_line_run(command, [str(trained), "--repo", REPO]) == 2
        told = capsys.readouterr().err
        assert "provenance.json holds what looks like a token" in told and secret not in told
    assert hub.asked == []


def test_a_private_repository_is_not_shown_to_others(hub, trained, monkeypatch, target) -> None:
    publish(trained, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(
        ValueError, match="neither a folder here nor a reachable Hub repository"
    ) as caught:
        load_pretrained(REPO, target)
    assert "hf_another" not in str(caught.value)


def test_the_command_in_a_process_of_its_own(hub: Hub, trained: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_DEBUG": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints.publish", str(trained), "--repo", REPO],
        text=True,
        capture_output=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert f"published: {hub.url}/{REPO}/commit/" in done.stdout
    assert "authorization: <TOKEN>" in done.stderr and TOKEN not in done.stdout + done.stderr
    assert set(hub.repositories[REPO].files) == FILES


@pytest.mark.parametrize(
    "pickled", ["pytorch_model.bin", "medusa_lm_head.pt", "pytorch_model-00001-of-00002.bin"]
)
def test_a_repository_of_pickles_is_not_downloaded_and_says_how_to_convert_them(
    hub: Hub, target, pickled
) -> None:
    """As many public drafters lie on the Hub: their files are listed, and never fetched."""
    repository = hub.repositories["ada/public"] = Repository(private=False)
    repository.commit({"config.json": b'{"medusa_num_heads": 2}', pickled: b"x" * 10_000})
    with pytest.raises(
        ValueError,
        match=f"'ada/public' holds its weights as {pickled} only, a pickle, .*: convert it",
    ) as caught:
        load_pretrained("ada/public", target)
    assert "\n" not in str(caught.value)
    assert not [
        path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.suffix in (".bin", ".pt")
    ]
    repository.commit({"notes.json": b"{}"})
    with pytest.raises(ValueError, match="'ada/public' holds no config.json: it is not a drafter"):
        load_pretrained("ada/public", target)

"""Publishing a trained component on the Hugging Face Hub: one commit with weights, card, report and
provenance.

The client reads the token by itself, from `HF_TOKEN` or from `hf auth login`. This module reads it
only to check that there is one, and to keep it out of messages and files; no variable of a function
that can fail holds it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from checkpoints.card import LICENSES, Publishing, hub_name, model_card
from checkpoints.export import export, refuse_unserved, trainable_class_of
from checkpoints.folders import (
    CONFIG,
    HUB_SECONDS,
    PICKLE_ENDINGS,
    PICKLED,
    WEIGHTS,
    hub_answers_within,
)
from checkpoints.measurement import measurement
from checkpoints.pretrained import (
    BESIDE,
    CARD,
    IN_RUN,
    PROVENANCE,
    find_folder,
    load_pretrained,
    read_config,
)
from checkpoints.provenance import Provenance
from configs.command_line.redaction import HIDDEN, portable, redacted
from modules.contracts.target import Target
from modules.runtime.files import read_object, whole_folder

REPORT = "report.json"
OWN = (CONFIG, WEIGHTS, PROVENANCE)
FILES = (*OWN, CARD, REPORT, *(f"{BESIDE}/{name}" for name in OWN), *PICKLED)
"""Files that a publication may have. Beside an engine's files, ours are in a folder."""
TIMEOUT = HUB_SECONDS
_MEANINGS = {
    401: "the token was refused: log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token may not do this: use one that may write to that name",
    404: "there is no such repository, or the token may not see it",
    409: "somebody else changes it at this moment: try again",
    413: "the Hub finds it too large",
    429: "too many requests: wait, and try again",
}


@dataclass(frozen=True)
class Publication:
    """Contents or paths of the published files, by their names in the repository.

    scratch: holds files that were made for it, and removes them with this object.
    """

    files: Mapping[str, bytes | Path]
    scratch: tempfile.TemporaryDirectory[str] | None = None


# -- what is published -----------------------------------------------------------------------------


def check_repo(repo: str) -> None:
    """Raise ValueError unless `repo` is the id of a repository, with its owner."""
    try:
        validate_repo_id(repo)
        whole = repo.count("/") == 1
    except HFValidationError:
        whole = False
    if not whole:
        raise ValueError(
            f"repo {repo!r} is not the id of a Hub repository: give USER/NAME, of letters, digits, "
            "'-', '_' and '.'"
        )


def check_token() -> None:
    """Raise ValueError unless there is a token for the Hub."""
    if get_token() is None:
        raise ValueError(
            "there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"
        )


def publication(
    run: Path,
    name: str,
    report: Path | None = None,
    row: str | None = None,
    license: str | None = None,
    form: str | None = None,
    target: Target | None = None,
) -> Publication:
    """All published files of a run, checked as far as possible without the Hub.

    Args:
        run: run folder or drafter folder.
        name: its name in the card: the Hub id, or a folder.
        report: a `report.json` with its figures.
        row: the name of its rows in the report, by default the run's.
        license: of the component; by default the target's where it is known, otherwise `other`.
        form: an engine's format, whose files are then beside ours: the engine reads the repository
            as it is.
        target: of the component, for the export; None loads it by name.

    Raises:
        ValueError: an incomplete component, a report of another one, a format that does not hold
            it, or a token in a file.
    """
    if not run.exists():
        raise ValueError(f"run {str(run)!r} does not exist: give a run folder or a drafter folder")
    # 1. The component, and its figures from the report.
    folder = find_folder(run)
    provenance, trainable = Provenance.read(folder / PROVENANCE), load_pretrained(folder)
    size = trainable.trained_size
    figures = None if report is None else measurement(report, name_of(run), size, provenance, row)
    sources = {CONFIG: folder / CONFIG, PROVENANCE: folder / PROVENANCE}
    # Before places are left out, which may take a credential along and with it the warning.
    _refuse_secrets(Publication(sources if report is None else {**sources, REPORT: report}))
    name = portable(name)
    scratch, engine, served = _for_engine(folder, name, form, target)
    publishing = Publishing(
        name, license or LICENSES.get(provenance.target["name"], "other"), figures, served
    )
    # 2. The card, without paths of this machine.
    config = portable(read_object(folder / CONFIG))
    card = model_card(trainable, read_config(folder), provenance, publishing)
    ModelCard(card)
    # 3. JSON files, likewise; weights are uploaded from where they lie.
    values = {CONFIG: config, PROVENANCE: portable(read_object(folder / PROVENANCE))}
    if report is not None:
        values[REPORT] = portable(read_object(report))
    texts = {
        file: (json.dumps(value, indent=2, sort_keys=file != REPORT) + "\n").encode()
        for file, value in values.items()
    }
    ours: dict[str, bytes | Path] = {WEIGHTS: folder / WEIGHTS, **texts}
    if engine:
        ours = {f"{BESIDE}/{file}" if file in OWN else file: ours[file] for file in ours}
    made = Publication({**engine, **ours, CARD: card.encode()}, scratch)
    _refuse_secrets(made)
    return made


def _for_engine(
    folder: Path, repo: str, form: str | None, target: Target | None
) -> tuple[Any, dict[str, bytes | Path], tuple[str, ...]]:
    """The folder of an export, its files, and the commands that serve the repository with them."""
    if form is None:
        return None, {}, ()
    refuse_unserved(trainable_class_of(folder), form)
    scratch = tempfile.TemporaryDirectory(prefix="slipstream-")
    place = Path(scratch.name) / form
    exported = export(folder, form, place, target)
    config = portable(dict(exported.config))
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(place.iterdir())}
    files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    # vLLM finds the target by itself, in a config that names it.
    verifier = config.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
    alone = [f"vllm serve {repo}"] if verifier is not None and hub_name(verifier) else []
    return scratch, files, (*alone, portable(exported.usage.replace("FOLDER", repo)))


def name_of(run: Path) -> str:
    """The default name of a component's rows in a report: its run's folder."""
    path = run.resolve()
    return path.parent.name if path.name in (IN_RUN, BESIDE) else path.name


def _refuse_secrets(made: Publication) -> None:
    """Raise ValueError if a published text, such as a command, contains a token."""
    for name, content in made.files.items():
        if Path(name).suffix not in (".safetensors", *PICKLE_ENDINGS) and _holds_token(
            content if isinstance(content, bytes) else content.read_bytes()
        ):
            raise ValueError(
                f"{name} holds what looks like a token or a password: take it out before "
                "publishing, and revoke it"
            )


def _holds_token(content: bytes) -> bool:
    token, text = get_token(), content.decode(errors="replace")
    return redacted(text) != text or (token is not None and token in text)


def write(made: Publication, folder: Path) -> None:
    """Write the files of a publication into a new folder.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output {str(folder)!r} exists: give a new folder")
    with whole_folder(folder) as fresh:
        for name, content in made.files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(
                content if isinstance(content, bytes) else content.read_bytes()
            )


# -- the Hub ---------------------------------------------------------------------------------------


def publish(
    run: Path,
    repo: str,
    private: bool = True,
    report: Path | None = None,
    row: str | None = None,
    license: str | None = None,
    form: str | None = None,
    target: Target | None = None,
) -> str:
    """Publish a run in one commit, or leave nothing on the Hub; publishing again is always safe.

    Args:
        run: run folder or drafter folder.
        repo: `USER/NAME`; created if it does not exist.
        private: whether only its owner sees it. An existing repository must have the same setting.
        report: see `publication`; so are `row`, `license`, `form` and `target`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a fault of the run, or the Hub's refusal and the state that is left there.
    """
    check_repo(repo)
    check_token()
    made = publication(run, repo, report, row, license, form, target)
    with hub_answers_within(TIMEOUT):
        return upload(made, repo, private)


def upload(made: Publication, repo: str, private: bool = True) -> str:
    """Validate the card, create the repository if needed, and commit; returns the commit's address.

    Raises:
        ValueError: the Hub's refusal, and the state that is left there.
    """
    api, created, failure = HfApi(token=True), False, ""
    try:
        ModelCard(_text(made.files[CARD])).validate()
        created = _create(api, repo, private)
        operations = _operations(made, [] if created else _files_of(api, repo, private))
        return api.create_commit(
            repo, operations, commit_message="Publish with Slipstream"
        ).commit_url
    except Exception as error:
        failure = _reason(error)
    except BaseException:
        _undo(api, repo, created)
        raise
    # Raised outside of the handler: the client's error holds the request, and with it the token.
    raise ValueError(f"{repo} could not be published: {failure}. {_undo(api, repo, created)}")


def _text(content: bytes | Path) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def _create(api: HfApi, repo: str, private: bool) -> bool:
    """Create a repository; False if it exists already."""
    try:
        api.create_repo(repo, private=private)
        return True
    except HfHubHTTPError as error:
        if error.response.status_code == 409 or (
            error.response.status_code == 403 and api.repo_exists(repo)
        ):
            return False
        raise


def _files_of(api: HfApi, repo: str, private: bool) -> list[str]:
    """Names of the files of an existing repository, whose privacy must be the requested one."""
    present = api.model_info(repo)
    if private and not present.private:
        raise ValueError(
            "it is there and public, and this would be private: add --public (publish.private: "
            "false), or make it private on the Hub"
        )
    if not private and present.private:
        raise ValueError(
            "it is there and private, and this would be public: leave --public out, or open it on "
            "the Hub"
        )
    return [file.rfilename for file in present.siblings or []]


def _operations(
    made: Publication, present: list[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add every file; delete files of an earlier publication that this one lacks."""
    added = [CommitOperationAdd(name, content) for name, content in made.files.items()]
    return [
        *added,
        *(
            CommitOperationDelete(name)
            for name in FILES
            if name in present and name not in made.files
        ),
    ]


def _undo(api: HfApi, repo: str, created: bool) -> str:
    """After a failure, delete the repository if it was created here and has no commit of ours;
    returns a sentence about the state on the Hub.
    """
    again = "publishing again is safe"
    if not created:
        return f"What was there is unchanged, unless only the answer was lost; {again}"
    try:
        # The answer may be lost although the commit arrived.
        if any(file.rfilename in FILES for file in api.model_info(repo).siblings or []):
            return f"The commit had arrived, only the answer was lost; {again}"
        api.delete_repo(repo)
        return f"Nothing is left on the Hub; {again}"
    except Exception as error:
        return (
            "It was created and is still there, empty, as it could not be deleted "
            f"({_reason(error)}); {again}"
        )


def _reason(error: BaseException) -> str:
    """The cause of an error, in one line without the token."""
    # 1. An answer of the Hub, anywhere in the chain of causes.
    refusal: BaseException | None = error
    while refusal is not None and not isinstance(refusal, HfHubHTTPError):
        refusal = refusal.__cause__
    if refusal is not None:
        status = refusal.response.status_code
        meaning = _MEANINGS.get(
            status, "the Hub is in trouble: try again later" if status >= 500 else "it was refused"
        )
        return _clean(
            f"{meaning} ({status}{', ' + refusal.server_message if refusal.server_message else ''})"
        )
    # 2. No answer, or another error.
    kinds = [type(each).__name__ for each in (error, error.__cause__) if each is not None]
    if any("Timeout" in kind for kind in kinds):
        return f"no answer within {TIMEOUT:g} seconds"
    return _clean(str(error) if type(error) is ValueError else f"{kinds[-1]}: {error}")


def _clean(message: str) -> str:
    token = get_token()
    line = " ".join(message.split())
    return redacted(line.replace(token, HIDDEN) if token else line)

"""A Hub of its own: the part of the Hugging Face Hub's API that its client speaks to publish and to
download a model.

It keeps repositories in memory, checks what it is sent (tokens, names, hashes, card metadata, the
order of things), and can be told to fail at any stage: with a status, by never answering, by
cutting the connection, or by losing an answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LICENSES = {"apache-2.0", "mit", "other"}
STAGES = {
    "validate": r"POST /api/validate-yaml",
    "create": r"POST /api/repos/create",
    "delete": r"DELETE /api/repos/delete",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/[^/]+)?",
    "tree": r"GET /api/models/[^/]+/[^/]+/tree/.*",
    "preupload": r"POST /api/models/[^/]+/[^/]+/preupload/main",
    "batch": r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch",
    "put": r"PUT /storage/\w+",
    "verify": r"POST /storage/verify",
    "commit": r"POST /api/models/[^/]+/[^/]+/commit/main",
    "resolve": r"(GET|HEAD) /[^/]+/[^/]+/resolve/.*",
}
"""Requests by the stage of publishing or downloading that they belong to."""


@dataclass
class Repository:
    """Files of the newest commit, all commits by their hash, and who may see them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        made = hashlib.sha1(
            f"{len(self.commits)} {sorted(files)}".encode() + b"".join(files.values())
        ).hexdigest()
        self.commits[made] = files
        return made


class Hub(ThreadingHTTPServer):
    """The server. `trouble[stage]` is a status, `hang`, `cut` (half-way through the request) or
    `lost` (the answer).
    """

    daemon_threads = True

    def __init__(self, token: str, user: str = "ada") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.user = token, user
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.trouble: dict[str, int | str] = {}
        self.asked: list[str] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Cut(Exception):
    """The connection is to be closed without an answer."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """A body that follows its head in a packet of its own is not held back for 40 ms."""
    server: Hub

    def handle_any(self) -> None:
        """Answer, or fail as told."""
        asked = f"{self.command} {self.path.split('?')[0]}"
        stage = next((name for name, pattern in STAGES.items() if re.fullmatch(pattern, asked)), "")
        self.server.asked.append(stage or asked)
        trouble = self.server.trouble.get(stage)
        try:
            if trouble == "cut":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                raise Cut
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if trouble == "hang":
                self.server.released.wait()
                raise Cut
            if isinstance(trouble, int):
                raise Refusal(
                    trouble, f"trouble on purpose for {self.headers.get('Authorization')}"
                )
            getattr(self, f"on_{stage}", self.on_unknown)(body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.answer({"error": str(refusal)}, refusal.status, headers)
        except Cut:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.server.trouble.get("lost") == self.server.asked[-1]:
            raise Cut
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def need_token(self) -> None:
        if not self.known:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def found(self) -> tuple[str, Repository]:
        """The repository in the path, if whoever asks may see it."""
        parts = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        name = f"{parts[0]}/{parts[1].removesuffix('.git')}"
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.known):
            raise Refusal(404 if self.known else 401, "Repository not found", "RepoNotFound")
        return name, repository

    # -- answers -----------------------------------------------------------------------------------

    def on_unknown(self, body: bytes) -> None:
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def on_validate(self, body: bytes) -> None:
        """A card's metadata: what the Hub's own validation wants of a model."""
        sent = json.loads(body)
        assert sent["repoType"] == "model"
        errors = list(card_errors(sent["content"]))
        self.answer(
            {"errors": [{"message": error} for error in errors], "warnings": []},
            400 if errors else 200,
        )

    def on_create(self, body: bytes) -> None:
        self.need_token()
        sent = json.loads(body)
        name = f"{sent.get('organization') or self.server.user}/{sent['name']}"
        if not name.startswith(self.server.user + "/"):
            raise Refusal(
                403,
                "You don't have the rights to create a model under the namespace "
                f"{name.split('/')[0]}",
            )
        if name in self.server.repositories:
            self.answer(
                {
                    "error": "You already created this model repo",
                    "url": f"{self.server.url}/{name}",
                },
                409,
            )
            return
        repository = self.server.repositories[name] = Repository(
            sent.get("visibility") == "private"
        )
        repository.commit(
            {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def on_delete(self, body: bytes) -> None:
        self.need_token()
        sent = json.loads(body)
        self.server.repositories.pop(f"{sent['organization']}/{sent['name']}")
        self.answer({})

    def on_info(self, body: bytes) -> None:
        name, repository = self.found()
        files = [{"rfilename": file} for file in repository.files]
        self.answer(
            {
                "id": name,
                "sha": repository.head,
                "private": repository.private,
                "siblings": files,
                "tags": [],
            }
        )

    def on_tree(self, body: bytes) -> None:
        _, repository = self.found()
        self.answer(
            [
                {"type": "file", "path": name, **described(name, content)}
                for name, content in repository.commits[self.revision(repository)].items()
            ]
        )

    def revision(self, repository: Repository) -> str:
        """The commit that a path asks for after `tree` or `resolve`."""
        asked = re.split(r"/(?:tree|resolve)/", self.path.split("?")[0], maxsplit=1)[1].split("/")[
            0
        ]
        return repository.head if asked == "main" else asked

    def on_preupload(self, body: bytes) -> None:
        self.need_token()
        _, repository = self.found()
        files = json.loads(body)["files"]
        oids = {name: oid_of(name, content) for name, content in repository.files.items()}
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "shouldIgnore": False,
                        "oid": oids.get(file["path"]),
                        "uploadMode": "lfs" if large(file["path"]) else "regular",
                    }
                    for file in files
                ]
            }
        )

    def on_batch(self, body: bytes) -> None:
        self.need_token()
        self.found()
        verify = {"href": f"{self.server.url}/storage/verify"}
        self.answer(
            {
                "transfer": "basic",
                "objects": [
                    {"oid": one["oid"], "size": one["size"]}
                    if one["oid"] in self.server.storage
                    else {
                        "oid": one["oid"],
                        "size": one["size"],
                        "authenticated": True,
                        "actions": {
                            "upload": {"href": f"{self.server.url}/storage/{one['oid']}"},
                            "verify": verify,
                        },
                    }
                    for one in json.loads(body)["objects"]
                ],
            }
        )

    def on_put(self, body: bytes) -> None:
        """Storage elsewhere: the address is the permission, the token must not come here."""
        assert self.headers.get("Authorization") is None
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.server.storage[oid] = body
        self.answer(b"")

    def on_verify(self, body: bytes) -> None:
        sent = json.loads(body)
        if len(self.server.storage.get(sent["oid"], b"")) != sent["size"]:
            raise Refusal(404, "not uploaded")
        self.answer({})

    def on_commit(self, body: bytes) -> None:
        """NDJSON: a header, then operations; all or nothing."""
        self.need_token()
        name, repository = self.found()
        header, *operations = [json.loads(line) for line in body.splitlines()]
        assert header["key"] == "header" and header["value"]["summary"]
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.storage:
                    raise Refusal(400, f"{value['path']} was never uploaded")
                files[value["path"]] = self.server.storage[value["oid"]]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        made = repository.commit(files)
        self.answer(
            {
                "success": True,
                "commitOid": made,
                "commitUrl": f"{self.server.url}/{name}/commit/{made}",
            }
        )

    def on_resolve(self, body: bytes) -> None:
        _, repository = self.found()
        commit, name = (
            self.revision(repository),
            self.path.split("?")[0].split("/resolve/", 1)[1].split("/", 1)[1],
        )
        if name not in repository.commits.get(commit, {}):
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = repository.commits[commit][name]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{oid_of(name, content)}"',
            "Accept-Ranges": "bytes",
        }
        self.answer(content, headers=headers)


def large(name: str) -> bool:
    """Whether a file goes to large-file storage."""
    return name.endswith(".safetensors")


def oid_of(name: str, content: bytes) -> str:
    """A large file's SHA-256, any other's hash in git."""
    if large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict[str, Any]:
    """Size and hashes of a file, as in a tree."""
    size, oid = len(content), oid_of(name, content)
    pointer = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if large(name) else {}
    return {"size": size, "oid": oid, **pointer}


def card_errors(content: str) -> list[str]:
    """What is wrong with a model card's metadata."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = (
        []
        if data.get("license", "other") in LICENSES
        else [f'"license" must be one of {sorted(LICENSES)}']
    )
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be an array')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
        errors.append('"base_model" must be the id of a model')
    for index, model in enumerate(data.get("model-index", [])):
        errors += [
            f'"model-index[{index}].{key}" is required'
            for key in ("name", "results")
            if key not in model
        ]
        for result in model.get("results", []):
            whole = result.get("task", {}).get("type") and {"name", "type"} <= set(
                result.get("dataset", {})
            )
            if not whole or not all(
                isinstance(one.get("value"), int | float | str) and one.get("type")
                for one in result.get("metrics", [])
            ):
                errors.append(f'"model-index[{index}].results" are not whole')
    return errors

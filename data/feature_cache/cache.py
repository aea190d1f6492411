"""The feature cache: states of the frozen target, computed once per document and keyed by a hash
of its tokens.

A folder holds `manifest.json` (the target, the states), `shards.jsonl` and safetensors shards of
about 32k tokens. Each shard has one tensor [S,H] per state, with its documents concatenated, and is
written atomically: an interrupted run can be continued, and a cache can be extended at any time.
Several processes, also on several machines, may write one folder at the same time, each a share of
the documents (`configs.command_line.work_share`). A finished shard is one more line of
`shards.jsonl`, whatever the size of the cache; caches of format 1 list their shards in the
manifest.

Shape legend: B documents, T tokens, H hidden size, S tokens of a shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.command_line.outputs import append_lines, write_whole
from configs.command_line.progress import progress_of
from configs.command_line.work_share import Share
from data.conversations import Tokens
from data.feature_cache.rounding import ORDINARY, restored, state_bytes, stored
from data.packing import collate
from modules.contracts.shapes import StateName
from modules.runtime.files import PARTIAL, as_umask_says, whole_file

if TYPE_CHECKING:
    from modules.contracts.target import Target

logger = logging.getLogger(__name__)

FORMAT = 2
READ = (1, 2)
"""Formats that are read; what is added to a cache of format 1 makes it one of format 2."""
MANIFEST, SHARDS = "manifest.json", "shards.jsonl"
CacheDtype = Literal["bfloat16", "float32", "int8"]
_ERRORS = "rms_error"
"""Key of a shard in the manifest: the rounding error of its states, by name
(`data.feature_cache.rounding`).
"""
_HASHED_GIB = 32.0
"""Caches up to this size are compared with their checksums before a training; larger ones by the
sizes of their files, because reading 16 TB takes hours, on every process.
"""
_MANIFEST_LOCK = ".lock-manifest"
"""Held while the manifest is read and written."""


class FeatureCache:
    """Reads cached states, memory-mapped.

    Args:
        folder: of the cache.
        fingerprint: of the target.
        names: states to read.

    Raises:
        ValueError: no cache in the folder, another target, or missing states.
    """

    def __init__(
        self, folder: str | Path, fingerprint: str, names: Sequence[StateName] = ()
    ) -> None:
        self.folder, self.names = Path(folder), tuple(names)
        self.manifest = read_manifest(self.folder)
        _check(self.manifest, self.folder, fingerprint, names)
        _tell_of_old_shards(self.manifest, self.folder)
        # Where each document lies: its shard, and its rows in it.
        self._index: dict[str, tuple[int, int, int]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            start = 0
            for key, length in shard["documents"]:
                self._index[key] = (number, start, start + length)
                start += length
        self._opened: dict[int, Any] = {}
        self._verified: set[int] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the document with this key is cached."""
        return key in self._index

    def __getstate__(self) -> dict[str, Any]:
        """The state without memory maps, which every process opens itself."""
        return {**self.__dict__, "_opened": {}}

    def require(self, documents: Sequence[Tokens]) -> None:
        """Check that all documents are cached and their shards are intact: by checksums, or in a
        large cache by the sizes of their files.

        Raises:
            ValueError: names the damaged shard, or the number of missing documents.
        """
        missing = sum(document.key not in self for document in documents)
        if missing:
            raise ValueError(
                f"features {str(self.folder)!r} lack {missing} of {len(documents)} documents: "
                "run `python -m data.features` with the same data and max_length to add them"
            )
        numbers = sorted({self._index[document.key][0] for document in documents})
        shards = self.manifest["shards"]
        size = sum(
            path.stat().st_size
            for path in (self.folder / shards[number]["file"] for number in numbers)
            if path.is_file()
        )
        for number in numbers:
            self.verify(number, hashed=size <= _HASHED_GIB * 2**30)

    def verify(self, number: int, hashed: bool = True) -> None:
        """Compare a shard's size, and `hashed` its checksum too. Raises ValueError for a damaged
        shard.
        """
        shard = self.manifest["shards"][number]
        if number in self._verified:
            return
        path = self.folder / shard["file"]
        # Shards of format 1 have no size in the manifest.
        intact = path.is_file() and path.stat().st_size == shard.get("bytes", path.stat().st_size)
        if not intact or (hashed and _sha256(path) != shard["sha256"]):
            raise ValueError(
                f"features shard {str(path)!r} is missing or damaged: delete it and run "
                "`python -m data.features` again"
            )
        if hashed:
            self._verified.add(number)

    def read(self, key: str) -> dict[StateName, Tensor]:
        """The states `{name: [T,H]}` of one document, in the cache's dtype (float32 from int8)."""
        number, start, stop = self._index[key]
        if number not in self._opened:
            path = self.folder / self.manifest["shards"][number]["file"]
            self._opened[number] = safe_open(path, framework="pt")
        opened, by_channel = self._opened[number], _ERRORS in self.manifest["shards"][number]
        return {
            name: restored(opened, str(name), start, stop, self.manifest["dtype"], by_channel)
            for name in self.names
        }


def cache_features(
    target: Target,
    documents: Sequence[Tokens],
    names: Sequence[StateName],
    folder: str | Path,
    dtype: CacheDtype = "bfloat16",
    batch_tokens: int = 2048,
    shard_tokens: int = 32768,
    progress: bool = True,
    share: Share | None = None,
    gib: float | None = None,
    computed: Callable[..., dict[str, Tensor]] | None = None,
) -> Path:
    """Compute the target's states of all documents, or of a share of them, that are not cached yet;
    returns the folder. The rounding error of the dtype is measured on every shard, stored in the
    manifest and printed.

    Args:
        names: state names, see `Target.features`; they are the same for all documents of a cache.
        dtype: of the stored states; a cache has one dtype.
        batch_tokens: tokens per target call (padding included).
        shard_tokens: approximate number of tokens per shard.
        progress: whether the size and a progress bar are shown.
        share: the part to compute; a process without a share waits for those with one.
        gib: largest size of the folder in GiB, all shares of all documents together.
        computed: gives states instead of the target (`data.feature_cache.vllm_states.Computed`).

    Raises:
        ValueError: a cache of another target, with other states or in another dtype, or one that
            would exceed `gib` or the disk.
    """
    folder, share = Path(folder), share or Share()
    folder.mkdir(parents=True, exist_ok=True)
    # 1. Partial files of killed processes, while no other process writes.
    with _writing(folder, share):
        if share.count == 1:
            _remove_leftovers(folder)
        # 2. What is missing, and whether there is room for it.
        manifest = _open_manifest(folder, target, names, dtype)
        held = {key for shard in manifest["shards"] for key, _ in shard["documents"]}
        lacking = {document.key: document for document in documents if document.key not in held}
        _check_size(folder, sum(map(len, lacking.values())), manifest, gib, progress)
        # 3. This process's part, shard by shard.
        mine = {document.key for document in documents if share.takes(document.key)}
        pending = [document for key, document in lacking.items() if key in mine]
        counts = len(held & mine), len(mine)
        began = time.monotonic()
        with progress_of("target states", "documents", *counts, progress) as advance:
            for group in _groups(pending, shard_tokens):
                states = (
                    computed(group, advance)
                    if computed
                    else _states(target, group, manifest, batch_tokens, advance)
                )
                _append_shard(folder, manifest, group, states, target)
        if pending and progress:
            _tell_speed(folder, sum(map(len, pending)), time.monotonic() - began)
            _tell_errors(folder)
    return folder


def _tell_speed(folder: Path, tokens: int, seconds: float) -> None:
    """Print how many tokens were written, and how fast."""
    print(
        f"features {str(folder)!r}: {tokens} tokens in {seconds:.0f} s, {tokens / seconds:.0f} "
        "tokens/s",
        flush=True,
    )


def _tell_errors(folder: Path) -> None:
    """Print the rounding error of each state, over all shards that recorded it."""
    manifest = read_manifest(folder)
    shards = [shard for shard in manifest["shards"] if _ERRORS in shard]
    # Squares are averaged by tokens.
    tokens = sum(shard["tokens"] for shard in shards)
    errors = {
        name: (sum(shard["tokens"] * shard[_ERRORS][name] ** 2 for shard in shards) / tokens) ** 0.5
        for name in manifest["states"]
    }
    figures = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
    print(
        f"features {str(folder)!r}: RMS error in {manifest['dtype']} by state, over the "
        f"{ORDINARY:.0%} of channels of least magnitude: {figures}",
        flush=True,
    )


def _check_size(
    folder: Path, tokens: int, manifest: dict[str, Any], gib: float | None, verbose: bool
) -> None:
    """Print the size of what will be written. Raises ValueError, before anything is computed, if it
    exceeds the limit or the disk.
    """
    # Sizes in GiB.
    each = len(manifest["states"]) * state_bytes(manifest["hidden_size"], manifest["dtype"]) / 2**30
    needed, there = tokens * each, sum(shard["tokens"] for shard in manifest["shards"]) * each
    free = shutil.disk_usage(folder).free / 2**30
    if tokens and verbose:
        print(
            f"features {str(folder)!r}: {tokens} tokens to add, {needed:.2f} GiB in "
            f"{manifest['dtype']} ({there:.2f} GiB are there, {free:.2f} GiB of the disk are free)",
            flush=True,
        )
    fix = "set data.features_dtype int8 (in another folder), lower data.max_response_tokens, or"
    if gib is not None and needed + there > gib:
        raise ValueError(
            f"data.features_gib is {gib:g}, but features {str(folder)!r} would hold "
            f"{needed + there:.4g} GiB: {fix} raise it"
        )
    if needed > free:
        raise ValueError(
            f"features {str(folder)!r} need {needed:.2f} GiB more and the disk has {free:.2f} "
            f"free: {fix} give another folder"
        )


def _states(
    target: Target, group: list[Tokens], manifest: dict[str, Any], batch_tokens: int, advance: Any
) -> dict[str, Tensor]:
    """The target's states [S,H] of a shard's documents in order; they are computed sorted by
    length, so that padding is small."""
    names = [_name(text) for text in manifest["states"]]
    by_document: dict[int, dict[str, Tensor]] = {}
    order = sorted(range(len(group)), key=lambda i: len(group[i]))
    for chosen in _length_batches(order, group, batch_tokens):
        batch = collate([[group[i]] for i in chosen], device=target.device)
        states_BTH = target.features(batch, names)
        for row, i in enumerate(chosen):
            by_document[i] = {str(n): states_BTH[n][row, : len(group[i])].cpu() for n in names}
        advance(len(chosen))
    # Back in the order of the documents.
    return {
        name: torch.cat([by_document[i][name] for i in range(len(group))]).contiguous()
        for name in by_document[0]
    }


def _length_batches(
    order: list[int], group: list[Tokens], batch_tokens: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(group[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _groups(documents: Sequence[Tokens], shard_tokens: int) -> Iterator[list[Tokens]]:
    group: list[Tokens] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= shard_tokens:
            yield group
            group, size = [], 0
    if group:
        yield group


# -- files -----------------------------------------------------------------------------------------


def _remove_leftovers(folder: Path) -> None:
    """Delete partial files of killed processes; no other process may be writing."""
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink()


def _append_shard(
    folder: Path,
    manifest: dict[str, Any],
    group: list[Tokens],
    states: dict[str, Tensor],
    target: Target,
) -> None:
    # 1. Round the states, and measure the error.
    held, errors = {}, {}
    for name, state in states.items():
        tensors, errors[name] = stored(name, state, manifest["dtype"])
        held |= tensors
    if not all(bool(torch.isfinite(tensor).all()) for tensor in held.values()):
        raise ValueError(
            f"the target's states hold NaN or infinity (in {manifest['dtype']}): use --dtype "
            "float32"
        )
    # 2. Write the shard under a name that its documents determine.
    digest = hashlib.sha256("".join(document.key for document in group).encode()).hexdigest()
    path = folder / f"shard-{digest[:16]}.safetensors"
    with whole_file(path) as partial:
        save_file(held, partial)
        as_umask_says(partial)
    shard = {
        "file": path.name,
        "sha256": _sha256(path),
        "bytes": path.stat().st_size,
        "tokens": sum(map(len, group)),
        "computed_in": _computing_in(target),
        _ERRORS: errors,
        "documents": [[document.key, len(document)] for document in group],
    }
    # 3. List it, among those of other processes.
    with _locked(folder / _MANIFEST_LOCK):
        if not _is_current(folder):
            _write_manifest(folder, read_manifest(folder))
        _end_line(folder / SHARDS)
        append_lines(folder / SHARDS, [json.dumps(shard)])


def _computing_in(target: Target) -> str:
    """The precision of matrix products at this point: the target's, or autocast's."""
    kind = target.device.type
    chosen = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else target.dtype
    return str(chosen).removeprefix("torch.")


def _open_manifest(
    folder: Path, target: Target, names: Sequence[StateName], dtype: str
) -> dict[str, Any]:
    """The manifest, created if missing, without shards whose files were deleted."""
    with _locked(folder / _MANIFEST_LOCK):
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            _check(manifest, folder, target.fingerprint(), names)
            _check_dtype(manifest, folder, dtype)
        else:
            manifest = {
                "format": FORMAT,
                "target": target.name,
                "fingerprint": target.fingerprint(),
                "head": target.head_digest(),
                "dtype": dtype,
                "hidden_size": target.shape.hidden_size,
                "states": [str(name) for name in names],
                "shards": [],
            }
        # A deleted shard is computed again: lists are only written where they change.
        existing = [shard for shard in manifest["shards"] if (folder / shard["file"]).is_file()]
        whole = {**manifest, "shards": existing}
        if len(existing) < len(manifest["shards"]) or not (folder / MANIFEST).exists():
            _write_manifest(folder, whole)
    return whole


def _check(
    manifest: dict[str, Any], folder: Path, fingerprint: str, names: Sequence[StateName]
) -> None:
    if manifest["fingerprint"] != fingerprint:
        raise ValueError(
            f"features {str(folder)!r} belong to target {manifest['target']!r} (fingerprint "
            f"{manifest['fingerprint']}), not to this one ({fingerprint}): give another folder"
        )
    missing = [str(name) for name in names if str(name) not in manifest["states"]]
    if missing:
        raise ValueError(
            f"features {str(folder)!r} hold states {', '.join(manifest['states'])} and lack "
            f"{', '.join(missing)}: build another folder with --states"
        )


def _tell_of_old_shards(manifest: dict[str, Any], folder: Path) -> None:
    """Warn about int8 shards without scales of channels."""
    old = sum(_ERRORS not in shard for shard in manifest["shards"])
    if old and manifest["dtype"] == "int8":
        logger.warning(
            "features %r hold %d int8 shards of an earlier version, whose middle layers may be "
            "half noise (no scale per channel): write them again into another folder",
            str(folder),
            old,
        )


def _check_dtype(manifest: dict[str, Any], folder: Path, dtype: str) -> None:
    if manifest["dtype"] != dtype:
        raise ValueError(
            f"features {str(folder)!r} are stored in {manifest['dtype']}, but data.features_dtype "
            f"is {dtype}: give another folder, or set data.features_dtype {manifest['dtype']}"
        )


def _is_current(folder: Path) -> bool:
    """Whether a folder's manifest is of this format."""
    return json.loads((folder / MANIFEST).read_text()).get("format") == FORMAT


def _end_line(path: Path) -> None:
    """Cut a line off that a killed process left unfinished."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def _listed(path: Path) -> list[dict[str, Any]]:
    """Shards of whole lines. A line without an end is of a process that was killed, or that is
    writing it now.
    """
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest with all shards of a folder.

    Raises:
        ValueError: no cache, a damaged one, or one of an unknown format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"features {str(folder)!r} hold no feature cache: build it with `python -m "
            "data.features`"
        )
    # Damage, then another version.
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"features manifest {str(path)!r} is not JSON ({error}): delete the folder"
        ) from None
    if manifest.get("format") not in READ:
        raise ValueError(
            f"features {str(folder)!r} are of format {manifest.get('format')}, not "
            f"{' or '.join(map(str, READ))}: delete the folder"
        )
    try:
        added = _listed(folder / SHARDS)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"features list {str(folder / SHARDS)!r} is not JSON ({error}): delete the folder"
        ) from None
    # A manifest that was rewritten holds shards that the list holds too.
    shards = {shard["file"]: shard for shard in (*manifest.get("shards", ()), *added)}
    return {**manifest, "shards": list(shards.values())}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write both files anew. Killed in between, the manifest's shards are those of before."""
    lines = "".join(json.dumps(shard) + "\n" for shard in manifest["shards"])
    write_whole(
        {
            folder / SHARDS: lines,
            folder / MANIFEST: json.dumps({**manifest, "format": FORMAT, "shards": []}),
        }
    )


def _name(text: str) -> StateName:
    return int(text) if text.isdigit() else text


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _writing(folder: Path, share: Share) -> Iterator[None]:
    """Lock a share for one process, or the whole folder if everything is written; others wait."""
    with _locked(folder / ".lock", shared=share.count > 1), _locked(folder / f".lock-{share}"):
        yield


@contextmanager
def _locked(path: Path, shared: bool = False) -> Iterator[None]:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "a+") as lock:
        # Say once why it takes long, then wait.
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if path.name != _MANIFEST_LOCK:
                logger.warning(
                    "waiting for another process that is writing features %r", str(path.parent)
                )
            fcntl.flock(lock, kind)
        yield

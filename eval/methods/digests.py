"""Digests of values and of everything that determines an object's behaviour; the first difference
of two headers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modules.contracts.trainable import Trainable
from modules.target.target import Target

_PLAIN = (str, int, float, bool, type(None))


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value, or of everything that determines an object's behaviour.

    For a module: class, arguments, parameters, buffers and corpora. For any other object: class and
    public attributes.
    """
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    # Tensors and arrays: type, shape and bytes.
    if isinstance(value, Target):
        _feed(sha, [value.fingerprint(), str(value.dtype)])
    elif isinstance(value, Tensor):
        _feed(sha, [str(value.dtype), list(value.shape)])
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        _feed(sha, [str(value.dtype), list(value.shape)])
        sha.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    # Modules and containers, part by part.
    elif isinstance(value, nn.Module):
        _feed_module(sha, value)
    elif isinstance(value, Mapping):
        _feed_all(sha, "object", [[str(key), inner] for key, inner in value.items()])
    elif isinstance(value, (list, tuple)):
        _feed_all(sha, "list", value)
    elif isinstance(value, (set, frozenset)):
        _feed_all(sha, "set", sorted(value))
    # Plain values with their type; other objects by class and public attributes.
    elif isinstance(value, _PLAIN):
        sha.update(f"{value!r}\0".encode("utf-8", "surrogatepass"))
    elif isinstance(value, (Enum, os.PathLike, torch.dtype, torch.device)):
        sha.update(f"{value}\0".encode())
    elif hasattr(value, "__dict__") and not hasattr(value, "__qualname__"):
        _feed(sha, _name(type(value)))
        _feed(sha, {name: part for name, part in sorted(vars(value).items()) if name[0] != "_"})
    else:
        sha.update(f"{_name(value)}\0".encode())


def _feed_all(sha: Any, kind: str, values: Sequence[Any]) -> None:
    sha.update(f"{kind} {len(values)}\0".encode())
    for value in values:
        _feed(sha, value)


def _feed_module(sha: Any, module: nn.Module) -> None:
    """Feed the class and arguments, then all tensors by name, and the corpora of the parts."""
    _feed(sha, _name(type(module)))
    _feed(sha, module.arguments if isinstance(module, Trainable) else None)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _feed(sha, {name: tensors[name] for name in sorted(tensors)})
    for name, part in module.named_modules():
        corpora = [value for value in vars(part).values() if _holds_arrays(value)]
        _feed(sha, [name, corpora] if corpora else None)


def _holds_arrays(value: Any) -> bool:
    """Whether an object holds arrays, as a datastore does."""
    return any(isinstance(part, np.ndarray) for part in getattr(value, "__dict__", {}).values())


def _name(value: Any) -> str:
    """The dotted name of a class or function, or of the class of any other object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value after a JSON round trip."""
    return json.loads(json.dumps(value, default=str))


def changed(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first innermost difference of two headers: its path, the old and the new value; None if
    the headers are equal."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            inner = changed(before.get(key), now.get(key), f"{name} {key}".strip())
            if inner is not None:
                return inner
    return name, before, now

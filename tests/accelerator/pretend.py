"""A pretend accelerator. Its tensors say that they are on `pretend:0` and hold their numbers on the
CPU.

What a real device refuses is refused: operands of two devices. What a real device makes the host
wait for is counted (a value that is read, an index whose size depends on values, a copy from or to
pageable memory), and so are launches of kernels and the bytes that they write, by phase. It stands
on torch's Python backends for the dispatch key PrivateUse1 (`torch.utils.backend_registration`), so
gradients, checkpointing and `device=` work as they do elsewhere. No kernels, streams, dtypes or
memory limits of CUDA are modelled.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
CODE = str(Path(__file__).resolve().parents[2] / "modules")
VALUES = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "bincount",
        "equal",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    }
)
"""Operators whose result, or its size, the host must know."""
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
COPIES = frozenset({"_to_copy", "copy_"})
NO_KERNEL = frozenset(
    {
        "_local_scalar_dense",
        "detach",
        "alias",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "set_",
    }
)


class Hooks(backend_registration._DummyBackendModule):
    """What torch asks a backend for besides operators."""

    def get_rng_state(self, *_: Any) -> Tensor:
        """The CPU's."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        """The CPU's."""
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Those of autocast, which is only switched off here."""
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Hooks())
DEVICE = torch.device(NAME, 0)


@dataclass
class Log:
    """What the device did since `clear`. Keys are phases; of waits also the reason and the line of
    our code.
    """

    phase: str = ""
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    """Bytes."""

    def clear(self) -> None:
        """Forget everything."""
        self.waits.clear()
        self.launches.clear()
        self.written.clear()

    def wait(self, reason: str) -> None:
        """The host waits for the device."""
        self.waits[self.phase, reason, line()] += 1

    def launch(self, results: Any, operands: list[Tensor]) -> None:
        """A kernel ran; what it wrote is not a view of its operands."""
        known = {operand.untyped_storage().data_ptr() for operand in operands}
        fresh = [
            result
            for result in map(here, tree_leaves(results))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known
        ]
        self.launches[self.phase] += bool(fresh)
        self.written[self.phase] += sum(result.nbytes for result in fresh)


LOG = Log()


def line() -> str:
    """The innermost line of the package `modules` that is running."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(CODE):
        frame = frame.f_back
    return (
        "" if frame is None else f"{frame.f_code.co_filename.removeprefix(CODE)}:{frame.f_lineno}"
    )


class There(torch.Tensor):
    """A tensor of the pretend device."""

    here: Tensor
    __slots__ = ("here",)

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        """Wrap a CPU tensor."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """With its numbers."""
        return f"There({self.here})"

    def __deepcopy__(self, memo: dict[int, Any]) -> There:
        """Of buffers."""
        return memo.setdefault(id(self), There(self.here.clone()))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator with a tensor of the device."""
        return run(func, args, kwargs or {})


def here(value: Any) -> Any:
    """What the device holds, on the CPU."""
    return value.here if isinstance(value, There) else value


def there(value: Any) -> Any:
    """The same value on the device."""
    return There(value) if isinstance(value, Tensor) and not isinstance(value, There) else value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operator on the CPU, as the device would; count what it would cost."""
    name = func._schema.name.partition("::")[2]
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [operand for operand in operands if isinstance(operand, There)]
    result_there = bool(ours)
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    note_waits(name, args, operands, ours, result_there and not kwargs.get("non_blocking"))
    results = func(*tree_map(here, args), **tree_map(here, kwargs))
    if (ours or result_there) and name not in NO_KERNEL:
        changed = func._schema.is_mutable
        inputs = [] if changed else [here(operand) for operand in ours]
        # What an operator changes in place it writes as far as the changes reach, not as a whole.
        LOG.launch(args[-1] if changed and isinstance(args[-1], Tensor) else results, inputs)
    if func._schema.is_mutable and args and isinstance(args[0], Tensor):
        return args[0]
    return tree_map(there, results) if result_there else results


def note_waits(
    name: str, args: Any, operands: list[Tensor], ours: list[There], to_device: bool
) -> None:
    """Count what makes the host wait. RuntimeError: operands of two devices."""
    others = [operand for operand in operands if not isinstance(operand, There)]
    if name in COPIES:
        source = args[1] if name == "copy_" else args[0]
        target_there = isinstance(args[0], There) if name == "copy_" else to_device
        if isinstance(source, There) != target_there:
            LOG.wait("copy to the device" if target_there else "copy from the device")
    elif ours and name in INDEXED and isinstance(args[0], There):
        if others and any(index is not None and not isinstance(index, There) for index in args[1]):
            LOG.wait("an index of the host")
        if any(index is not None and index.dtype == torch.bool for index in args[1]):
            LOG.wait("a boolean index")
    elif ours and any(other.dim() for other in others):
        raise RuntimeError(f"tensors on two devices in {name} at {line()}")
    if ours and name in VALUES:
        LOG.wait(name)


class Operators(TorchDispatchMode):
    """Operators without a tensor of the device that make one, such as `torch.zeros(…,
    device=…)`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Those of the device go to `run`."""
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        ours = asked is not None and torch.device(asked).type == NAME
        if ours or any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs))):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """Functions that reach for a tensor's memory before any operator is called, and attention,
    which is one kernel.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Those few; all others as they are."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if not isinstance(first, There):
            return func(*args, **kwargs)
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", first.dtype)).to(DEVICE)
        if func is torch.Tensor.tolist:
            LOG.wait("tolist")
            return first.here.tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return func(first, tree_map_lists(args[1]), *args[2:])
        if func is torch.nn.functional.scaled_dot_product_attention and not torch.is_grad_enabled():
            found = There(func(*tree_map(here, args), **tree_map(here, kwargs)))
            LOG.launch(found.here, [])
            return found
        return func(*args, **kwargs)


def tree_map_lists(index: Any) -> Any:
    """Lists of an index as tensors of the device, which costs a copy."""
    if isinstance(index, tuple):
        return tuple(tree_map_lists(part) for part in index)
    return torch.tensor(index).to(DEVICE) if isinstance(index, list) else index


@contextmanager
def pretending() -> Iterator[Log]:
    """While the block lasts tensors can be made on `DEVICE` and moved there."""
    LOG.clear()
    with torch.autograd.set_multithreading_enabled(False), Functions(), Operators():
        yield LOG

"""The one import package of an installation: `from slipstream.checkpoints.pretrained import
load_pretrained`.

The packages themselves (`modules`, `configs`, `data`, `checkpoints`, `eval`, `train`) lie beside
this folder in a checkout and inside it in an installation. Importing `slipstream` makes them
importable by these names, which class paths of configs use; `slipstream.modules.X` is the same
module as `modules.X`, never a second copy of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGES = ("checkpoints", "configs", "data", "eval", "modules", "train")
_INSTALLED = Path(__file__).resolve().parent / "_packages"
HOME = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1]
"""The folder that holds the packages."""


class _SameModule:
    """Finder and loader of `slipstream.NAME`: the module `NAME` itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a module of the packages; None for all other names."""
        root, _, inside = name.partition(".")
        if root != __name__ or inside.partition(".")[0] not in PACKAGES:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of the name without `slipstream.`, imported now or earlier."""
        module = importlib.import_module(spec.name.partition(".")[2])
        # The import system replaces the module's own spec by this one before `exec_module`.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back; its code has run."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _check_names() -> None:
    """Raise ImportError where a module of the user has the name of a package."""
    for name in PACKAGES:
        module = sys.modules.get(name)
        places = [Path(place).resolve() for place in getattr(module, "__path__", ())]
        if module is not None and places != [HOME / name]:
            raise ImportError(
                f"slipstream has a package {name!r}, but {module!r} has been imported under that "
                "name: rename that module"
            )


_check_names()
if str(HOME) not in sys.path:
    # First, so that a file `data.py` of the user's folder does not hide a package.
    sys.path.insert(0, str(HOME))
sys.meta_path.insert(0, _SameModule())  # type: ignore[arg-type]

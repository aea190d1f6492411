"""`python -m slipstream data.features ...` is `python -m data.features ...` of an installation."""

from __future__ import annotations

import runpy
import sys

from slipstream import PACKAGES


def main() -> None:
    """Run the module that the first argument names; exit status 2 without one."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name.partition(".")[0] not in PACKAGES:
        sys.exit(f"python -m slipstream MODULE ...: MODULE is one of {', '.join(PACKAGES)} and "
                 "what is in it, for instance data.features")  # fmt: skip
    sys.argv = sys.argv[1:]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

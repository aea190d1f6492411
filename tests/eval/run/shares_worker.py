"""One process of an evaluation on a tiny target, as `torchrun` would start it."""

from __future__ import annotations

import sys

import pytest

from configs.command_line import class_paths as classes
from eval import cli, evaluation
from eval.report import plots
from tests.fakes import tiny_target

if __name__ == "__main__":
    classes.allow(["tests"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_target", lambda *_: tiny_target())
        patch.setattr(plots, "svg", lambda *_: "<svg></svg>")
        cli.main(sys.argv[1:])

"""One thread here and in every process that tests start: sums of other thread counts round
differently, and tests that compare processes bit by bit would fail wherever a machine has several
cores."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("tests.modules.conformance")
torch.set_num_threads(1)

from configs.command_line import class_paths as classes  # noqa: E402

classes.allow(["tests"])


def pytest_collection_finish() -> None:
    """What was imported is no garbage: collections need not look through it again and again."""
    gc.collect()
    gc.freeze()

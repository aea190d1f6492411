"""Controls that a trustworthy harness passes: plain decoding against itself, drafters at random and
without a fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.methods.rows import Row
from eval.metrics.acceptance import TIE_GAP
from eval.report.summary import summarise
from eval.run.harness import Harness, units
from eval.run.journal import Journal
from eval.tasks.tasks import Prompt, Task
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from tests.eval.fakes import Replay
from tests.eval.test_cli import config, methods, run, tiny
from tests.fakes import ScriptedDrafter, ids_by_batch, many_prompts, tiny_target

PLAIN = {"name": "again", "decoder": {"class_path": "modules.decoding.decoder.SpeculativeDecoder"}}
RANDOM = {"name": "random", "drafter": {"class_path": "tests.fakes.RandomDrafter"}}
PERFECT = {
    "name": "perfect",
    "drafter": {"class_path": "tests.fakes.ScriptedDrafter", "init_args": {"depth": 3}},
}
__all__ = ["tiny"]


def test_controls_through_the_whole_harness(tmp_path: Path) -> None:
    path = config(tmp_path, [PLAIN, RANDOM, PERFECT], max_new_tokens=9)
    assert run("--config", path, "--output", "out", "--limit", "2") == 0
    rows = methods()
    assert all(
        row["lossless"] and row["identical_outputs"] == row["prompts"] == 4 for row in rows.values()
    )
    assert rows["again"]["mean_accepted_tokens"] == 1.0 and rows["again"]["new_tokens"] == 4 * 9
    assert 1.0 <= rows["random"]["mean_accepted_tokens"] < 1.2
    assert rows["random"]["quality"]["drafted_nodes_per_call"] > 2
    assert rows["perfect"]["conditional_acceptance_by_depth"] == [1.0] * 3
    assert rows["perfect"]["mean_accepted_tokens"] == 4.0


def test_plain_decoding_against_itself_on_the_same_clock_is_exactly_one(tmp_path: Path) -> None:
    target = tiny_target()
    rows = [
        Row(name, Replay(target), target, Sampling(), "autoregressive")
        for name in ("autoregressive", "again")
    ]
    tasks = [Task("x", tuple(Prompt(f"x/{i}", "x", (f"question {i}",)) for i in range(4)))]
    records = Harness(rows, 6).run(units(tasks, 1, 1), Journal(tmp_path / "j.jsonl", {}, False))
    plain, again = (summary.figures for summary in summarise(rows, records))
    assert again["speedup"]["ci95"] == [1.0, 1.0] and again["lossless"]
    assert plain["quality"]["noise"] == {"micro": 1.0, "ci95": (1.0, 1.0)}


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-10), (torch.float32, TIE_GAP)])
def test_one_prefix_scored_token_by_token_and_k_at_a_time(dtype: torch.dtype, apart: float) -> None:
    """What plain decoding and verification think of the same tokens; in float32 within what counts
    as a tie.
    """
    target = tiny_target(dtype=dtype)
    answer = torch.randint(5, 128, (1, 24), generator=torch.Generator().manual_seed(4))
    scored = {}
    for width in (1, 2, 3, 4, 6, 8, 12, 24):
        session = target.open(1, 64)
        session.prefill(torch.tensor([[9, 8, 7, 6]]), torch.tensor([4]))
        rows = []
        for tokens in answer.split(width, 1):
            rows.append(session.verify(TokenTree.chain(tokens)).logits_BNV[0])
            session.commit(
                Accepted(torch.arange(width)[None], torch.tensor([width]), tokens[:, -1])
            )
        scored[width] = torch.cat(rows)
    for width, logits in scored.items():
        assert (logits - scored[1]).abs().max() <= apart, width
        assert torch.equal(logits.argmax(-1), scored[1].argmax(-1))


@pytest.mark.parametrize("right", [None, 0.6])
def test_batches_of_4_and_16_are_plain_decoding_however_many_drafts_are_right(
    right: float | None,
) -> None:
    target, prompts = tiny_target(), many_prompts(16)
    drafter = None if right is None else ScriptedDrafter(target.shape, right, depth=2)
    alone = ids_by_batch(SpeculativeDecoder(target), prompts, 1, 6)
    assert all(
        ids_by_batch(SpeculativeDecoder(target, drafter), prompts, size, 6) == alone
        for size in (4, 16)
    )

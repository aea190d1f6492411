"""Every drafter of configs/eval/training_free.yaml: no token changed, whatever stands beside it in
the batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from configs.command_line.loading import CONFIGS
from eval.methods.rows import load_drafter
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.rasd import Rasd
from modules.drafters.retrieval.suffix_array import Datastore
from modules.target.target import Target
from tests.fakes import ScriptedDrafter, ids_by_batch, many_prompts, tiny_target
from tests.modules.sampling import Counts, first_two_tokens, homogeneous, small_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]
METHODS = {
    method["name"]: method["drafter"]
    for method in yaml.safe_load((CONFIGS / "eval" / "training_free.yaml").read_text())["methods"]
    if "drafter" in method
}


def made(name: str, target: Target, folder: Path, documents: list[list[int]]) -> Drafter:
    """The row's drafter, over a small datastore where it wants one."""
    Datastore.build(documents, target.shape.vocab_size).save(folder)
    spec = METHODS[name]
    arguments = dict(spec.get("init_args") or {})
    if "datastore" in arguments:
        arguments["datastore"] = str(folder)
    recycling = {"successors": min(8, target.shape.vocab_size)}
    if name.startswith("token_recycling"):
        arguments |= recycling
    if "partner" in arguments:
        arguments["partner"] = {**arguments["partner"], "init_args": recycling}
    return load_drafter({"class_path": spec["class_path"], "init_args": arguments}, target)


@pytest.fixture(params=METHODS)
def drafter(request: pytest.FixtureRequest, tmp_path: Path) -> Drafter:
    return made(request.param, TARGET, tmp_path, [[7, 8, 9, 10], [20, 30, 31], [42, 40, 41]])


@pytest.fixture(scope="module")
def plain_counts() -> Counts:
    return first_two_tokens(SpeculativeDecoder(small_target()), 1000)


def test_a_batch_and_each_prompt_alone_are_plain_decoding(drafter: Drafter) -> None:
    expected = [trace.ids for trace in SpeculativeDecoder(TARGET).decode(PROMPTS, Sampling(), 20)]
    decoder = SpeculativeDecoder(TARGET, drafter)
    assert [trace.ids for trace in decoder.decode(PROMPTS, Sampling(), 20)] == expected
    assert [decoder.decode([prompt], Sampling(), 20)[0].ids for prompt in PROMPTS] == expected
    assert not list(drafter.parameters())


def test_batches_of_4_and_16_decode_the_same_ids_as_each_prompt_alone(drafter: Drafter) -> None:
    decoder, prompts = SpeculativeDecoder(TARGET, drafter), many_prompts(16)
    alone, by_four, together = (ids_by_batch(decoder, prompts, size, 8) for size in (1, 4, 16))
    assert by_four == alone and together == alone


@pytest.mark.parametrize("name", [*METHODS, "rasd with a partner"])
def test_sampled_decoding_keeps_the_targets_distribution(
    name: str, plain_counts: Counts, tmp_path: Path
) -> None:
    """Through the whole loop at temperature 1; drafts that the sampled text looks up are among
    them.
    """
    target = small_target()
    partner = ScriptedDrafter(target.shape, right=0.5, depth=2, decoys=1)
    drafter = (
        made(name, target, tmp_path, [[3, 1, 2, 4], [1, 2, 5, 3], [4, 4, 1, 5]])
        if name in METHODS
        else Rasd(target.shape, partner, tokens=8)
    )
    assert (
        homogeneous(plain_counts, first_two_tokens(SpeculativeDecoder(target, drafter), 1000))
        > 1e-4
    )

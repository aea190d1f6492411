"""Every architecture passes the proof at load, and every fault that it is for is refused by the
name of the failing part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.contracts.rows import Rows
from modules.layers import document_attention
from modules.target import loading
from modules.target.architecture import Architecture
from modules.target.kv_cache import SlotCache
from modules.target.loading import load_target
from modules.target.stock import proof
from modules.target.stock.proof import prove
from modules.target.stock.recurrent import Paths, RecurrentStates, paths_of
from modules.target.target import Target
from tests.architectures import ARCHITECTURES, MORE, RECURRENT
from tests.fakes import tiny_target

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *MORE, *RECURRENT])
def test_every_architecture_is_proven(arch: str) -> None:
    prove(tiny_target(arch))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *MORE])
def test_texts_too_long_for_one_mask_are_proven(arch: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(document_attention, "WHOLE_ROWS", 4)
    monkeypatch.setattr(document_attention, "PART_ROWS", 3)
    prove(tiny_target(arch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions_of_use_are_proven(dtype: torch.dtype) -> None:
    for arch in ("llama", "gpt_oss", "qwen3_moe", "deepseek_v3", "gemma3", "qwen3_next", "lfm2"):
        prove(tiny_target(arch, dtype))


def swap_layers(target: Target, _: Patch) -> None:
    """The library's model keeps its order."""
    first, second = target.architecture.layers[:2]
    first.forward, second.forward = second.forward, first.forward


def forget_windows(_: Target, patch: Patch) -> None:
    patch.setattr("modules.target.architecture._distance", lambda *_: torch.tensor(0))


def forget_wide_windows(target: Target, patch: Patch) -> None:
    """Windows of more tokens than the proof reads."""
    for config in (target.architecture.config, target.stock.config):
        config.sliding_window = 400
    forget_windows(target, patch)


def forget_scale(target: Target, _: Patch) -> None:
    target.architecture.logit_scale = 1.0


def forget_cap(target: Target, _: Patch) -> None:
    target.architecture.softcap = None


def another_norm(target: Target, _: Patch) -> None:
    target.architecture.norm = target.architecture.layers[0].get_submodule("input_layernorm")


def stay_in_place(_: Target, patch: Patch) -> None:
    patch.setattr(SlotCache, "_compact", lambda *_: None)


def see_siblings(_: Target, patch: Patch) -> None:
    mask = Architecture.mask

    def loose(self: Architecture, rows: Any, cache: Any, embeddings: Any) -> Any:
        if cache is not None and rows.position_ids_BN.shape[1] == len(proof.PARENTS):
            rows = Rows(rows.position_ids_BN, torch.ones_like(rows.visible_BNJ))
        return mask(self, rows, cache, embeddings)

    patch.setattr(Architecture, "mask", loose)


def join_documents(_: Target, patch: Patch) -> None:
    mask = Architecture.mask

    def loose(self: Architecture, rows: Any, cache: Any, embeddings: Any) -> Any:
        if cache is None:
            count = rows.position_ids_BN.shape[1]
            causal = torch.ones(1, count, count, dtype=torch.bool).tril()
            rows = Rows(rows.position_ids_BN, causal)
        return mask(self, rows, cache, embeddings)

    patch.setattr(Architecture, "mask", loose)


def count_alike(_: Target, patch: Patch) -> None:
    """Both sequences have as many tokens as the longer one."""
    patch.setattr(
        SlotCache, "lengths_tensor", lambda self, _: torch.tensor([max(self.lengths)] * 2)
    )


@pytest.mark.parametrize("arch", ["llama", "gemma3", "cohere", "nemotron", "gpt2"])
def test_gains_of_norms_are_what_they_multiply_by(arch: str) -> None:
    """A row of ones and minus ones has no mean and a mean square of one."""
    target = tiny_target(arch)
    signs = torch.ones(32).double()
    signs[::2] = -1
    gain = (target.final_norm(signs) - target.final_norm(-signs)) / (2 * signs)
    torch.testing.assert_close(target.copy_weight("norm"), gain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["granite", "cohere", "llama"])
def test_rows_of_the_head_give_scaled_logits(arch: str) -> None:
    target, ids = tiny_target(arch), torch.tensor([3, 50])
    hidden = torch.randn(4, 32).double()
    for rows in (target.lm_head_rows(ids), target.copy_weight("lm_head")[ids]):
        torch.testing.assert_close(hidden @ rows.T, target.logits(hidden)[:, ids])


def read_in_a_row(target: Target, patch: Patch) -> None:
    """Recurrent layers take a tree for a chain."""
    found = target.architecture.recurrence.paths

    def one_path(batch: int) -> Paths:
        rows = target.architecture.recurrence._rows
        if rows is None or rows.position_ids_BN.shape[1] != len(proof.PARENTS):
            return found(batch)
        visible = rows.visible_BNJ
        chain = torch.ones(visible.shape[1:], dtype=torch.bool).tril()
        return paths_of(chain.expand(batch, -1, -1))

    patch.setattr(target.architecture.recurrence, "paths", one_path)


def never_replay(_: Target, patch: Patch) -> None:
    def forget(self: RecurrentStates, accepted: Any) -> None:
        if self.committed:
            self.inputs, self.after = {}, {}
        else:
            commit(self, accepted)

    commit = RecurrentStates.commit
    patch.setattr(RecurrentStates, "commit", forget)


def lose_one_row(target: Target, patch: Patch) -> None:
    logits = target.logits

    def changed(hidden: torch.Tensor, *options: Any) -> torch.Tensor:
        found = logits(hidden, *options).clone()
        found[0, -1] = 0 if found.dim() == 3 else found[0, -1]
        return found

    patch.setattr(target, "logits", changed)


FAULTS: dict[str, tuple[str, Callable[[Target, Patch], None], str]] = {
    "swapped layers": ("llama", swap_layers, "layer 0 differs"),
    "no window": ("mistral", forget_wide_windows, "layer 0 differs"),
    "no window in one layer": ("gpt_oss", forget_windows, "layer 0 differs"),
    "no scale": ("granite", forget_scale, "the LM head differs"),
    "no cap": ("gemma2", forget_cap, "the LM head differs"),
    "another norm": ("qwen3", another_norm, "the final norm differs"),
    "siblings": ("deepseek_v3", see_siblings, "tree attention differs"),
    "documents": ("gpt2", join_documents, "layer 0 differs"),
    "moved rows": ("qwen3_moe", stay_in_place, "the KV cache after a commit differs"),
    "one row": ("llama", lose_one_row, "the LM head differs"),
    "states": ("qwen3_next", read_in_a_row, "tree attention differs"),
    "no replay": ("qwen3_next", never_replay, "the KV cache after a commit differs"),
    "lengths": ("llama", count_alike, "tree attention differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_with_the_failing_part(fault: str, monkeypatch: Patch) -> None:
    arch, plant, part = FAULTS[fault]
    target = tiny_target(arch, torch.float32)
    prove(target)
    plant(target, monkeypatch)
    with pytest.raises(ValueError, match=part) as caught:
        prove(target)
    assert f"tiny-{arch}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "part"),
    [("bloom", "a pass without a KV cache stops with"), ("gpt_neo", "tree attention differs")],
)
def test_models_that_count_positions_themselves_are_refused(arch: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        prove(tiny_target(arch))


def test_windows_are_as_before_and_nothing_is_random() -> None:
    target = tiny_target("gpt_oss")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prove(target)
    assert torch.equal(torch.rand(2), expected)
    assert target.architecture.config.sliding_window == target.stock.config.sliding_window == 6


def test_a_target_is_proven_once_when_it_is_loaded(tmp_path: Path, monkeypatch: Patch) -> None:
    target = tiny_target("qwen3_moe", torch.float32)
    target.stock.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    proven: list[Target] = []
    monkeypatch.setattr(loading, "prove", proven.append)
    monkeypatch.setenv(loading.UNPROVEN, "1")
    load_target(str(tmp_path), device="cpu")
    assert not proven
    monkeypatch.delenv(loading.UNPROVEN)
    for _ in range(2):
        loaded = load_target(str(tmp_path), device="cpu")
    assert len(proven) == 1
    load_target(str(tmp_path), "bfloat16", "cpu")
    assert len(proven) == 2 and loaded.fingerprint() == target.fingerprint()

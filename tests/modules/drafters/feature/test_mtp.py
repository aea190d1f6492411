"""What makes MTP: a head that starts from the target, or from the one in its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.drafters.feature.mtp import MTP
from modules.losses.chunked import training_rows
from modules.target.loading import load_target
from modules.target.target import Target
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import filled

TARGET = tiny_target()
QWEN = {
    "eh_proj": "mtp.fc",
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "norm": "mtp.norm",
    "layer": "mtp.layers.0",
}
DEEPSEEK = {
    "eh_proj": "model.layers.2.eh_proj",
    "enorm": "model.layers.2.enorm",
    "hnorm": "model.layers.2.hnorm",
    "norm": "model.layers.2.shared_head.norm",
    "layer": "model.layers.2",
}


def head_of(target: Target, names: dict[str, str]) -> tuple[MTP, dict[str, Tensor]]:
    """A head with random weights, and its tensors under the names of a layout."""
    torch.manual_seed(2)
    head = MTP(target.shape).to(target.dtype)
    tensors = {}
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
            module, _, rest = name.partition(".")
            stored = parameter.detach().clone()
            if parameter.dim() == 1 and target.architecture.offset_norms:
                stored -= 1
            tensors[f"{names[module]}.{rest}"] = stored
    return head, tensors


def stored_target(folder: Path, arch: str, tensors: dict[str, Tensor], apart: bool) -> Target:
    """A tiny target of that folder, whose checkpoint also has these tensors."""
    target = tiny_target(arch, torch.float32)
    target.stock.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    file, metadata = folder / "model.safetensors", {"format": "pt"}
    if apart:
        save_file(tensors, folder / "mtp.safetensors", metadata)
    else:
        save_file({**load_file(file), **tensors}, file, metadata)
    return load_target(str(folder), "float32", device="cpu")


# -- the beginning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "names", "apart"),
    [("llama", QWEN, True), ("qwen3", DEEPSEEK, False), ("gemma", QWEN, False)],
    ids=["qwens_layout", "deepseeks_layout", "norms_stored_less_one"],
)
@torch.no_grad()
def test_the_head_of_a_checkpoint_is_taken_by_its_names(tmp_path, arch, names, apart) -> None:
    head, tensors = head_of(tiny_target(arch, torch.float32), names)
    if names is DEEPSEEK:
        tensors["model.layers.2.embed_tokens.weight"] = torch.zeros(128, 32)
        tensors["model.layers.2.shared_head.head.weight"] = torch.zeros(128, 32)
    else:
        tensors["mtp.layers.1.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    target = stored_target(tmp_path, arch, tensors, apart)
    for start in ("auto", "checkpoint"):
        drafter = MTP(target.shape, draft_vocabulary=40, start=start)
        drafter.initialise(target)
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(drafter.get_parameter(name), parameter)
    fresh = MTP(target.shape, start="scratch")
    fresh.initialise(target)
    assert not torch.equal(fresh.eh_proj.weight, head.eh_proj.weight)


def test_a_head_that_is_not_there_or_of_another_kind_is_refused(tmp_path) -> None:
    _, tensors = head_of(tiny_target(dtype=torch.float32), QWEN)
    tensors["mtp.fc.weight"] = torch.zeros(32, 32)
    tensors["mtp.layers.0.mlp.gate.weight"] = torch.zeros(4, 32)
    target = stored_target(tmp_path / "odd", "llama", tensors, False)
    words = r"layer.mlp.gate.weight, eh_proj.weight\): set start to 'scratch'"
    with pytest.raises(ValueError, match=words):
        MTP(target.shape).initialise(target)
    plain = stored_target(tmp_path / "plain", "llama", {}, False)
    with pytest.raises(ValueError, match="hold no head for later tokens .*: set start to"):
        MTP(plain.shape, start="checkpoint").initialise(plain)
    MTP(plain.shape).initialise(plain)
    with pytest.raises(ValueError, match="start must be one of auto, checkpoint, scratch"):
        MTP(plain.shape, start="nowhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("post_norm", [True, False])
@torch.no_grad()
def test_from_scratch_it_begins_with_the_targets_own_logits(post_norm: bool) -> None:
    """Of states before the norm exactly, of those behind it up to their size."""
    drafter = MTP(TARGET.shape, post_norm=post_norm, start="scratch").double()
    drafter.initialise(TARGET)
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    rows = training_rows(batch, 3)
    feature, _ = next(iter(drafter.unrolled(batch, TARGET, rows)))
    final = rows.take(batch.states["final"])
    if post_norm:
        feature, final = (part / part.norm(dim=-1, keepdim=True) for part in (feature, final))
    torch.testing.assert_close(feature, final, atol=1e-5, rtol=1e-4)


# -- the steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_vocabulary", [None, 40])
@torch.no_grad()
def test_on_policy_steps_read_the_drafters_own_tokens_in_training_alone(draft_vocabulary) -> None:
    drafter = made(draft_vocabulary=draft_vocabulary, on_policy=True)
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    rows, read, vectors = training_rows(batch, 3), [], drafter.vectors

    def recorded(ids: Tensor, target: Target) -> Tensor:
        read.append(ids)
        return vectors(ids, target)

    drafter.vectors = recorded
    for training in (True, False):
        read.clear()
        features = [each for each, _ in drafter.train(training).unrolled(batch, TARGET, rows)]
        for step in (1, 2):
            likely = drafter.head(step, TARGET)(features[step - 1]).argmax(-1)
            if draft_vocabulary:
                likely = drafter.vocabulary_D[likely]
            own, text = (torch.equal(read[step], ids) for ids in (likely, rows.tokens_MK1[:, step]))
            assert (own, text) == (training, not training)


def made(**arguments: Any) -> MTP:
    torch.manual_seed(3)
    drafter = MTP(TARGET.shape, start="scratch", **arguments).double()
    if drafter.vocabulary_D is not None:
        drafter.set_vocabulary(torch.randperm(128)[: drafter.draft_size])
    drafter.initialise(TARGET)
    for parameter in drafter.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return drafter


def test_steps_weigh_powers_of_the_decay_and_learn_the_texts_tokens() -> None:
    """FastMTP's loss, by hand."""
    with torch.no_grad():
        drafter = made(decay=0.6)
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    rows, total = training_rows(batch, 3), 0.0
    for step, (feature, _) in enumerate(drafter.unrolled(batch, TARGET, rows)):
        logs = TARGET.logits(feature).log_softmax(-1)
        valid, labels = rows.valid_MK[:, step], rows.tokens_MK1[:, step + 1]
        total -= 0.6**step * logs[valid, labels[valid]].mean().item()
    assert drafter.loss(batch, TARGET, 0.0).total.item() == pytest.approx(total)


@pytest.mark.parametrize("draft_vocabulary", [None, 40])
def test_the_texts_tokens_are_added_outside_of_the_chain_of_rejections(draft_vocabulary) -> None:
    """AngelSpec's loss, by hand: Σ_k mean(1 − Π_{j≤k} α_j) + 0.1 · mean cross-entropy."""
    with torch.no_grad():
        drafter = made(
            draft_vocabulary=draft_vocabulary,
            divergence="expected_length",
            decay=1.0,
            hard_weight=0.1,
        )
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    rows, total = training_rows(batch, 3), torch.zeros(()).double()
    final, reached = batch.states["final"].flatten(0, 1), torch.ones(()).double()
    ids = torch.arange(128) if drafter.vocabulary_D is None else drafter.vocabulary_D
    for step, (feature, _) in enumerate(drafter.unrolled(batch, TARGET, rows)):
        p = TARGET.logits(final[rows.flat_MK1[:, step + 1]]).softmax(-1)[:, ids]
        logs = drafter.head(step, TARGET)(feature).log_softmax(-1)
        valid, text = rows.valid_MK[:, step], rows.tokens_MK1[:, step + 1]
        reached = reached * torch.where(valid, torch.minimum(p, logs.exp()).sum(-1), 1.0)
        draftable = valid & torch.isin(text, ids)
        labels = torch.searchsorted(ids, text[draftable])
        hard = -logs[draftable].gather(1, labels[:, None]).mean()
        total = total + (1 - reached[valid]).mean() + 0.1 * hard
    loss = drafter.loss(batch, TARGET, 0.0).total
    torch.testing.assert_close(loss, total)
    parameters = list(drafter.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(total, parameters)
    )
    with pytest.raises(ValueError, match="hard_weight is 0.1: .*: set divergence, or hard_weight"):
        MTP(TARGET.shape, hard_weight=0.1)

"""An MTP head goes back into its target's files, bit for bit where it was not trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.export import write
from checkpoints.formats import mtp
from modules.drafters.feature.mtp import MTP
from modules.target.loading import load_target
from modules.target.target import Target
from tests.fakes import tiny_target
from tests.modules.drafters.feature.test_mtp import DEEPSEEK, QWEN, head_of, stored_target

LAYOUTS = pytest.mark.parametrize(
    ("arch", "names", "apart"),
    [("llama", QWEN, True), ("qwen3", DEEPSEEK, False), ("gemma", QWEN, False)],
    ids=["qwens_layout", "deepseeks_layout", "norms_stored_less_one"],
)


def with_head(folder: Path, arch: str, names: dict[str, str], apart: bool) -> tuple[Target, MTP]:
    """A target whose files hold a head in bfloat16 with small norms, and the drafter of it."""
    _, tensors = head_of(tiny_target(arch, torch.float32), names)
    # Norms near 0, of which a sum with 1 in float32 loses bits, and a head that is not the first.
    tensors = {
        name: (tensor * 1e-6 if tensor.dim() == 1 else tensor).bfloat16()
        for name, tensor in tensors.items()
    }
    tensors["mtp.layers.1.self_attn.q_proj.weight"] = torch.ones(32, 32)
    target = stored_target(folder, arch, tensors, apart)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    drafter = MTP(target.shape, draft_vocabulary=40, norm_output=names is QWEN)
    drafter.initialise(target)
    return target, drafter


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}: {name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@LAYOUTS
@torch.no_grad()
def test_an_untrained_head_gives_the_targets_files(tmp_path, arch, names, apart) -> None:
    target, drafter = with_head(tmp_path / "target", arch, names, apart)
    exported = mtp.exported(drafter, target)
    write(exported, tmp_path / "out")
    before, after = bits(tmp_path / "target"), bits(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    # The rest of the folder, without code and pickles.
    there = {file.name for file in (tmp_path / "target").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == there - {
        "modeling_own.py",
        "pytorch_model.bin",
    }
    assert "drafts from all 128 tokens" in exported.notes[0]
    assert '"method": "mtp", "num_speculative_tokens": 3' in exported.usage


@LAYOUTS
@torch.no_grad()
def test_a_trained_head_is_the_head_of_the_new_target(tmp_path, arch, names, apart) -> None:
    target, drafter = with_head(tmp_path / "target", arch, names, apart)
    for parameter in drafter.parameters():
        parameter.copy_((parameter + 0.5).bfloat16().float())
    write(mtp.exported(drafter, target), tmp_path / "out")
    again = MTP(target.shape, draft_vocabulary=40, start="checkpoint")
    again.initialise(load_target(str(tmp_path / "out"), "float32", device="cpu"))
    # Stored norms less one have bits of their own size.
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=2e-3, rtol=1e-6)
    # Nothing else has changed.
    stored = {each.name for each in mtp.stored_head(target).values()}
    before, after = bits(tmp_path / "target"), bits(tmp_path / "out")
    changed = {
        name.split(": ")[1] for name, part in before.items() if not torch.equal(part, after[name])
    }
    assert changed == stored


def test_what_vllm_would_run_differently_is_refused(tmp_path) -> None:
    target, _ = with_head(tmp_path / "target", "llama", QWEN, True)
    with pytest.raises(ValueError, match="norm_output is False, and vLLM runs heads of Qwen's"):
        mtp.exported(MTP(target.shape, norm_output=False), target)
    with pytest.raises(ValueError, match="post_norm is False, and vLLM runs heads of Qwen's"):
        mtp.exported(MTP(target.shape, post_norm=False), target)
    plain = stored_target(tmp_path / "plain", "llama", {}, False)
    with pytest.raises(ValueError, match="hold no head for later tokens, so vLLM loads none"):
        mtp.exported(MTP(plain.shape), plain)
    file = tmp_path / "target" / "mtp.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mtp.layers.0.mlp.gate.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(ValueError, match="is another one .layer.mlp.gate.weight."):
        mtp.exported(MTP(target.shape), target)

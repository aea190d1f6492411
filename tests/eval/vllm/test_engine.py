"""`eval.py --engine vllm` against a module that stands in for vLLM, in a process of its own as the
real one is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from checkpoints.export import refuse_unserved
from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance, command_line
from eval import verify_vllm
from eval.vllm import loading as vllm_loading
from eval.vllm.engine import (
    Worker,
    cut_off,
    drafted_tokens,
    emitted_by_calls,
    environment,
    format_for,
    sampling_arguments,
    traces,
)
from eval.vllm.worker import difference
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.drafters.block_diffusion.dflash import DFlash
from modules.drafters.block_diffusion.dflash2 import DFlash2
from modules.drafters.block_diffusion.domino import Domino
from modules.drafters.block_diffusion.dspark import DSpark
from modules.drafters.block_diffusion.lilicorr import LiLiCorr
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.peagle import PEagle
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.drafters.small_models.independent import Independent
from tests.eval.test_cli import config, methods, report, run, target_of, tiny

__all__ = ["tiny"]
FAKE = Path(__file__).parent.parent / "fake_engine"
KINDS: dict[str, tuple[type[Drafter], dict[str, Any]]] = {
    "medusa": (Medusa, {"heads": 3, "draft_vocabulary": 40}),
    "eagle3": (Eagle3, {"draft_vocabulary": 40, "depth": 2}),
    "eagle": (Eagle, {"draft_vocabulary": 40, "bias": False}),
    "independent": (Independent, {"layers": 1}),
    "clover": (Clover, {}),
    "domino": (Domino, {"block": 3, "layers": 1}),
    "eagle31": (Eagle3, {"norm_before_fc": True, "norm_output": True, "depth": 2}),
    "peagle": (PEagle, {"block": 3, "draft_vocabulary": 40}),
    "dflash": (DFlash, {"block": 3, "layers": 1, "draft_vocabulary": 40, "fused_layers": [1]}),
    "dspark": (DSpark, {"block": 3, "layers": 1, "rank": 4, "fused_layers": [1]}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, target = tmp_path_factory.mktemp("runs"), target_of("float32")
    for name, (kind, settings) in KINDS.items():
        drafter: Any = kind(target.shape, **settings)
        drafter.initialise(target)
        save_pretrained(drafter, folder / name / "drafter", Provenance.of(target))
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The stand-in is installed; the file in which it notes what it was asked to serve."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(tmp_path / "served.jsonl"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "served.jsonl"


def arguments(path: Path, runs: Path, *names: str, **settings: Any) -> list[str]:
    found = [
        "--config",
        config(path, [], dtype="float32", **settings),
        "--engine",
        "vllm",
        "--output",
        "out",
    ]
    return [*found, "--drafters", *(str(runs / name) for name in names)]


# -- the whole way ---------------------------------------------------------------------------------


def test_rows_through_vllm_fill_the_same_report(tmp_path: Path, runs: Path, served: Path) -> None:
    assert run(*arguments(tmp_path, runs, "medusa", "eagle3", batch_size=[1, 3])) == 0
    rows, settings = methods(), report()["settings"]
    names = ["autoregressive", "medusa", "eagle3"]
    assert list(rows) == [*names, *(f"{name}, 3 at once" for name in names)]
    assert settings["engine"] == "vllm" and {row["engine"] for row in rows.values()} == {"vllm"}
    assert all(row["lossless"] and row["identical_outputs"] == 6 for row in rows.values())
    assert (
        rows["autoregressive"]["mean_accepted_tokens"] == 1.0
        and rows["autoregressive"]["budget"] == 0
    )
    assert "noise" in rows["autoregressive"]["quality"]
    medusa, eagle = rows["medusa"], rows["eagle3"]
    assert medusa["budget"] == 3 and eagle["budget"] == 2 and medusa["builder"] == "chain"
    assert 2.0 < eagle["mean_accepted_tokens"] < medusa["mean_accepted_tokens"] < 3.0
    # The engine accepts 0, 1, 2, 3 drafts in turn; the sixth part of its calls is cut at the end.
    assert medusa["acceptance_by_depth"] == pytest.approx([0.6, 0.4, 0.2], abs=0.05)
    calls = sum(medusa["accepted_length_histogram"])
    assert calls * medusa["mean_accepted_tokens"] == pytest.approx(6 * 11)
    assert medusa["drafter_parameters"] > 0 and medusa["peak_memory_bytes"] > 0
    assert (
        rows["medusa, 3 at once"]["batch_size"] == 3
        and rows["medusa, 3 at once"]["mean_accepted_tokens"] > 2
    )
    assert medusa["seconds_by_phase"]["verify"] == 0 < medusa["seconds_by_phase"]["prefill"]
    asked = [json.loads(line) for line in served.read_text().splitlines()]
    assert [(one["method"], one["num_speculative_tokens"]) for one in asked] == [
        ("medusa", 3),
        ("eagle3", 2),
    ]
    assert {one["dtype"] for one in asked} == {"float32"} and asked[1]["config"][
        "speculators_model_type"
    ] == "eagle3"
    assert not any(Path(one["model"]).exists() for one in asked)
    assert list(tmp_path.glob("vllm-*")) == []


def test_a_small_language_model_is_served_as_a_draft_model(
    tmp_path: Path, runs: Path, served: Path
) -> None:
    """As its model card says."""
    assert run(*arguments(tmp_path, runs, "independent", limit=1)) == 0
    (asked,) = (json.loads(line) for line in served.read_text().splitlines())
    assert (asked["method"], asked["num_speculative_tokens"]) == ("draft_model", 3)
    assert asked["config"]["architectures"] == ["LlamaForCausalLM"]
    assert "export_notes" not in methods()["independent"]["quality"]


def test_drafters_of_blocks_are_served_with_all_their_tokens(
    tmp_path: Path, runs: Path, served: Path
) -> None:
    names = ("peagle", "eagle31", "dflash", "dspark")
    assert run(*arguments(tmp_path, runs, *names, limit=1)) == 0
    asked = [json.loads(line) for line in served.read_text().splitlines()]
    assert [
        (one["method"], one.get("parallel_drafting"), one["num_speculative_tokens"])
        for one in asked
    ] == [("eagle3", True, 3), ("eagle3", None, 2), ("dflash", None, 3), ("dspark", None, 3)]
    kinds = [one["config"]["speculators_model_type"] for one in asked]
    assert kinds == ["peagle", "eagle3", "dflash", "dspark"]
    assert asked[0]["config"]["mask_token_id"] == 3 and asked[1]["config"]["norm_output"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Domino, "neither vLLM nor SGLang loads Domino"),
        (DFlash2, "vLLM and SGLang load DFlash2, but no export"),
        (LiLiCorr, "SGLang loads no LiLiCorr, and no export in vLLM's format"),
    ],
)
def test_which_engine_cannot_load_a_drafter_is_said(kind: type, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        format_for(kind, "methods: x")
    with pytest.raises(ValueError, match=words):
        refuse_unserved(kind, "dflash")


def test_what_an_export_changes_is_said_in_the_report(
    tmp_path: Path, runs: Path, served: Path
) -> None:
    """EAGLE with a trimmed vocabulary drafts from all tokens in vLLM."""
    assert run(*arguments(tmp_path, runs, "eagle", "eagle3", limit=1, batch_size=[1, 2])) == 0
    (note,) = methods()["eagle"]["quality"]["export_notes"]
    assert note.startswith("the engine drafts from all 128 tokens, this project from 40")
    for name in ("report.md", "report.html"):
        assert Path("out", name).read_text().count(f"xported eagle, eagle, 2 at once: {note}.") == 1


def test_sampled_rows_have_the_seeds_of_their_prompts(
    tmp_path: Path, runs: Path, served: Path
) -> None:
    assert run(*arguments(tmp_path, runs, "medusa", temperature=[0, 1], top_p=0.9, limit=1)) == 0
    rows = methods()
    assert list(rows) == ["autoregressive", "medusa", "autoregressive at 1", "medusa at 1"]
    assert rows["medusa at 1"]["lossless"] is None and len(served.read_text().splitlines()) == 1


def test_a_method_with_its_own_temperature_has_its_own_baseline(
    tmp_path: Path, runs: Path, served: Path
) -> None:
    warm = {"name": "warm", "drafter": str(runs / "medusa"), "budget": 2, "temperature": 0.5}
    path = config(tmp_path, [warm], dtype="float32", limit=1)  # type: ignore[list-item]
    assert run("--config", path, "--engine", "vllm", "--output", "out") == 0
    assert (
        list(methods()) == ["autoregressive", "autoregressive at 0.5", "warm"]
        and methods()["warm"]["budget"] == 2
    )


def test_a_drafter_that_changes_tokens_fails(
    tmp_path: Path, runs: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "lies")
    assert run(*arguments(tmp_path, runs, "medusa", limit=1)) == 1
    assert methods()["medusa"]["lossless"] is False and methods()["autoregressive"]["lossless"]


def test_a_finished_journal_starts_no_engine(tmp_path: Path, runs: Path, served: Path) -> None:
    given = arguments(tmp_path, runs, "medusa", limit=1)
    assert run(*given) == 0
    served.unlink()
    assert run(*given, "--resume") == 0 and not served.exists()


# -- what fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, said",
    [
        (
            "refuses",
            "autoregressive: vLLM failed: RuntimeError: layers.0.hidden_norm.weight has no place",
        ),
        ("dies", "medusa: vLLM failed: its process ended with status 9"),
    ],
)
def test_failures_of_vllm_are_one_line_and_keep_its_log(
    tmp_path: Path,
    runs: Path,
    served: Path,
    fault: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_VLLM", fault)
    assert run(*arguments(tmp_path, runs, "medusa", limit=1)) == 2
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") == 0
    assert "vLLM writes to stdout" in next(tmp_path.glob("vllm-*.log")).read_text()


def test_counters_that_contradict_each_other_are_not_reported() -> None:
    with pytest.raises(AssertionError, match="contradict"):
        emitted_by_calls(
            {"drafts": [4], "accepted_tokens": [9], "accepted_tokens_per_pos": [3, 2, 1]}
        )


@pytest.mark.parametrize(
    "extra, said",
    [
        (["--dtype", "float64"], "dtype 'float64': vLLM does not compute in it"),
        (["--device", "cpu"], "device 'cpu': vLLM runs on what it was built for"),
        (["--engine", "sglang"], "engine"),
    ],
)
def test_settings_that_vllm_cannot_have(
    tmp_path: Path,
    runs: Path,
    served: Path,
    extra: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*arguments(tmp_path, runs, "medusa"), *extra) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, said",
    [
        (
            {"decoder": {"class_path": "eval.methods.huggingface.HuggingFaceGenerate"}},
            "`decoder` belongs to this project's own loop",
        ),
        ({"drafter": "medusa", "rule": "typical"}, "`rule` belongs"),
        ({"drafter": "medusa", "budget": "auto"}, "budget 'auto' belongs"),
        ({"drafter": "medusa", "budget": 4}, "has 3 heads: give 3 at most"),
        (
            {"drafter": {"class_path": "tests.fakes.ScriptedDrafter"}},
            "a drafter without training has no export",
        ),
        ({"drafter": "clover"}, "vLLM serves no Clover"),
        ({"drafter": "domino"}, "neither vLLM nor SGLang loads Domino: leave it out"),
        ({"drafter": "dflash", "budget": 2}, "were trained with 3: give 3"),
    ],
)
def test_methods_that_vllm_cannot_run(
    tmp_path: Path,
    runs: Path,
    served: Path,
    method: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = method.get("drafter")
    given = {**method, "name": "x"} | (
        {"drafter": str(runs / source)} if isinstance(source, str) else {}
    )
    path = config(tmp_path, [given], dtype="float32", limit=1)  # type: ignore[list-item]
    assert run("--config", path, "--engine", "vllm", "--output", "out") == 2
    assert said in capsys.readouterr().err and not served.exists()


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is installed")
def test_without_vllm_one_line_says_so(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(*arguments(tmp_path, runs, "medusa")) == 2
    error = capsys.readouterr().err
    assert "vLLM is not installed in this Python" in error and "make verify-vllm" in error
    assert error.strip().count("\n") == 0


# -- the parts -------------------------------------------------------------------------------------


def test_calls_follow_from_counters() -> None:
    counted = {"drafts": [7], "accepted_tokens": [6], "accepted_tokens_per_pos": [4, 2, 0]}
    assert emitted_by_calls(counted) == [1, 1, 1, 2, 2, 3, 3]
    assert (
        emitted_by_calls({"drafts": [0], "accepted_tokens": [0], "accepted_tokens_per_pos": [0]})
        == []
    )


def test_what_is_cut_off_at_the_ends_of_answers_is_not_counted() -> None:
    """vLLM counts before the cut. Calls without drafts have no counter: then the sum is small."""
    assert cut_off([1, 1, 3, 3], 8, 2) == [1, 1, 3, 3] == cut_off([3, 1, 3, 1], 12, 2)
    assert cut_off([1, 1, 3, 3], 6, 1) == [1, 1, 1, 3]
    assert cut_off([1, 2, 4, 4], 9, 1) == [1, 2, 2, 4]
    assert cut_off([1, 1, 3, 3], 5, 2) == [1, 1, 1, 2] and cut_off([1, 1], 1, 1) == [1, 1]
    assert cut_off([], 0, 1) == []
    counted = {"drafts": [3], "accepted_tokens": [4], "accepted_tokens_per_pos": [2, 2]}
    reply = {
        "ids": [[5] * 4, [6] * 3],
        "first_tokens": [0.1, 0.1],
        "seconds": 1.0,
        "counted": counted,
    }
    found = traces([[7], [8]], reply, drafting=True)
    assert sum(sum(trace.accepted) for trace in found) == 3 + 2


def test_counters_are_differences() -> None:
    before = {"drafts": [3], "accepted_tokens": [1], "accepted_tokens_per_pos": [0]}
    after = {"drafts": [5], "accepted_tokens": [4], "accepted_tokens_per_pos": [2, 2]}
    assert difference(before, after) == {
        "drafts": [2],
        "accepted_tokens": [3],
        "accepted_tokens_per_pos": [2, 2],
    }


def test_sampling_is_said_in_vllms_words() -> None:
    target = target_of("float32")
    greedy = sampling_arguments(Sampling(), 4, 20, target)
    assert greedy == {
        "max_tokens": 20,
        "temperature": 0.0,
        "stop_token_ids": [0],
        "detokenize": False,
    }
    assert sampling_arguments(Sampling(0.7, 5, 0.9, 100), 4, 20, target) == {
        **greedy,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "seed": 104,
    }


def test_the_environment_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert environment()["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment()["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert environment()["VLLM_CPU_KVCACHE_SPACE"] == "9"


def test_the_chain_is_as_deep_as_the_drafters_tree() -> None:
    shape = target_of("float32").shape
    assert drafted_tokens(Eagle3(shape, depth=4), None, "x") == 4
    assert drafted_tokens(Eagle3(shape, depth=4), 7, "x") == 7
    assert drafted_tokens(Medusa(shape, heads=2), 1, "x") == 1


# -- what becomes of tensors -----------------------------------------------------------------------


class Loaded(nn.Module):
    """Two projections merged into one parameter, as engines do, a norm, and a map of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.merged, self.norm = nn.Parameter(torch.empty(6, 4)), nn.Parameter(torch.ones(4))
        self.ids = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
        self.register_buffer("mask_hidden", torch.zeros(1, 12), persistent=False)
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        self.layers[1].hidden_norm = nn.RMSNorm(4)
        self.mask_embedding, self.embed_tokens = nn.Parameter(torch.ones(4)), nn.Embedding(3, 4)


def fitting_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(4, 4),
        "k": torch.randn(2, 4),
        "norm": torch.randn(4),
        "d2t": torch.tensor([1, 5, 9]),
        "t2d": torch.ones(8, dtype=torch.bool),
        "mask_hidden": torch.randn(1, 1, 12),
    }


@pytest.mark.parametrize(
    "left_out, extra, missing, unused",
    [
        ([], [], [], []),
        (["k"], [], ["merged"], []),
        (["norm"], [], ["norm"], []),
        (["d2t"], [], ["ids"], []),
        (["mask_hidden"], [], ["mask_hidden"], []),
        ([], ["fc.bias"], [], ["fc.bias"]),
    ],
)
def test_missing_and_unused_tensors_are_found(
    left_out: list[str],
    extra: list[str],
    missing: list[str],
    unused: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped = fitting_tensors() | {name: torch.randn(6, 4) for name in extra}
    monkeypatch.setattr(
        vllm_loading,
        "read_tensors",
        lambda folder: {name: tensor for name, tensor in shipped.items() if name not in left_out},
    )

    class Loader:
        def load_weights(self, model: Any, model_config: Any) -> None:
            places = {
                "q": model.merged[:4],
                "k": model.merged[4:],
                "norm": model.norm,
                "d2t": model.ids,
                "mask_hidden": model.mask_hidden[None],
            }
            with torch.no_grad():
                for name in set(places) - set(left_out):
                    places[name].copy_(shipped[name])

    name = "vllm.model_executor.model_loader.default_loader"
    loaders: Any = SimpleNamespace(DefaultModelLoader=Loader)
    monkeypatch.setitem(sys.modules, name, loaders)
    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    found = vllm_loading.watch(str(tmp_path))
    with torch.no_grad():
        Loader().load_weights(Loaded(), SimpleNamespace(model="another"))
        assert found == {}
        Loader().load_weights(Loaded(), SimpleNamespace(model=str(tmp_path)))
    assert found == {"shipped": len(shipped) - len(left_out), "missing": missing, "unused": unused}


# -- the verification ------------------------------------------------------------------------------


def row(**changed: Any) -> dict[str, Any]:
    return {
        "name": "eagle3",
        "lossless": True,
        "first_divergence": None,
        "mean_accepted_tokens": 2.0,
        "tie_divergences": 0,
        "identical_outputs": 24,
        "prompts": 24,
        "acceptance_by_depth": [0.6, 0.4],
        **changed,
    }


LOADED = {"shipped": 15, "missing": [], "unused": []}


def test_a_right_export_has_no_faults() -> None:
    finding = verify_vllm.Finding(LOADED, row(mean_accepted_tokens=2.09), row())
    assert (
        finding.faults() == []
        and finding.cells()[-1] == "right"
        and finding.ratio == pytest.approx(1.045)
    )


@pytest.mark.parametrize(
    "finding, said",
    [
        (
            verify_vllm.Finding({**LOADED, "unused": ["fc.bias"]}, row(), row()),
            "eagle3: unused tensors: fc.bias",
        ),
        (
            verify_vllm.Finding({**LOADED, "missing": ["norm"]}, row(), row()),
            "eagle3: missing tensors: norm",
        ),
        (
            verify_vllm.Finding(LOADED, row(lossless=False), row()),
            "answers differ from vLLM's without the drafter",
        ),
        (
            verify_vllm.Finding(LOADED, row(), row(lossless=False)),
            "answers differ from plain decoding in our own loop",
        ),
        (
            verify_vllm.Finding(LOADED, row(mean_accepted_tokens=1.89), row()),
            "0.945 times ours, more than 5% off",
        ),
        (
            verify_vllm.Finding(
                LOADED, row(mean_accepted_tokens=1.0), row(mean_accepted_tokens=1.05)
            ),
            "train it until",
        ),
        (verify_vllm.Finding(LOADED, row(mean_accepted_tokens=None), row()), "0.000 times ours"),
    ],
)
def test_faults_are_named(finding: verify_vllm.Finding, said: str) -> None:
    assert (
        len(finding.faults()) == 1
        and said in finding.faults()[0]
        and finding.cells()[-1] == "wrong"
    )


def test_the_verification_measures_both_loops(
    tmp_path: Path, runs: Path, served: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter has not been trained, so what must come out is a fault, with exit status 1,
    whatever share of its drafts is right by chance."""
    monkeypatch.setattr(verify_vllm, "LEAST_ACCEPTED", 2.0)
    monkeypatch.setattr(verify_vllm, "load_target", lambda *_: target_of("float32"))
    monkeypatch.setattr(verify_vllm, "loading", lambda *_: LOADED)
    prompts = config(tmp_path, []).replace("config.yaml", "prompts.jsonl")
    given = [
        "--drafters",
        str(runs / "medusa"),
        "--prompts",
        prompts,
        "--limit",
        "1",
        "--output",
        "found",
        "--max_new_tokens",
        "12",
    ]
    assert verify_vllm.command(given) == 1
    shown = capsys.readouterr().out
    assert "which proves nothing" in shown and "| medusa | 15 | 0 | 0 | 2 of 2 |" in shown
    ours, theirs = (
        methods(Path("found/slipstream"))["medusa"],
        methods(Path("found/vllm"))["medusa"],
    )
    assert (ours["builder"], theirs["builder"], ours["budget"], theirs["budget"]) == (
        "StaticTree",
        "chain",
        3,
        3,
    )
    assert (Path("found") / "serving.md").read_text() in shown


def test_a_module_is_named_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/eval/verify_vllm.py", "--limit", "1"])
    started = SimpleNamespace(__spec__=SimpleNamespace(name="eval.verify_vllm"))
    monkeypatch.setitem(sys.modules, "__main__", started)  # type: ignore[arg-type]
    assert command_line() == "python -m eval.verify_vllm --limit 1"
    monkeypatch.setattr(started, "__spec__", None)
    assert command_line() == "python verify_vllm.py --limit 1"
    monkeypatch.setattr(sys, "argv", ["-c", "--limit", "1"])
    assert command_line() == "python -c ... --limit 1"


def test_nothing_to_verify_is_a_mistake(served: Path) -> None:
    with pytest.raises(ValueError, match="drafters: .* names none"):
        verify_vllm.command([])


def test_a_worker_says_where_it_failed(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="drafters: x: vLLM failed: TypeError"):
        Worker({"model": "m"}, "drafters: x")

"""Exports, held against what engines make of them (tests/checkpoints/engines.py), and imports of
the same folders.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints.export import command, export, write
from checkpoints.formats.known import FORMATS, format_of
from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained, warm_start
from modules.contracts.drafter import Context
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.drafters.heads.medusa import Medusa
from modules.drafters.heads.medusa2 import Medusa2
from modules.drafters.small_models.independent import Independent
from modules.drafters.trained import TrainedDrafter
from modules.target.target import Target
from modules.trees.static import StaticTree
from tests.checkpoints import engines
from tests.fakes import tiny_target

PROMPTS = [[7, 8, 9, 10, 11, 40, 3], [20, 21], [30, 31, 32, 33, 90, 91, 92, 93, 50, 51]]
DRAFTED, LAYERS, STEPS = 40, 8, 3


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=LAYERS)


@pytest.fixture(scope="module")
def qwen() -> Target:
    return tiny_target("qwen3", layers=LAYERS)


def shaken(drafter: TrainedDrafter, target: Target) -> TrainedDrafter:
    """A drafter in float64 whose weights are far from their beginnings, so that every detail
    matters.
    """
    torch.manual_seed(5)
    drafter.double()
    if drafter.vocabulary_D is not None:
        drafter.set_vocabulary(torch.randperm(target.shape.vocab_size)[:DRAFTED])
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return drafter.eval()


def ours(drafter: TrainedDrafter, target: Target, ids: list[int], steps: int = STEPS) -> list[int]:
    """The chain that this project drafts after `ids`, whose last is the newest."""
    prompt, lengths = torch.tensor([ids[:-1]]), torch.tensor([len(ids) - 1])
    session = target.open(1, 64)
    _, states = session.prefill(prompt, lengths, drafter.decoding_states)
    with torch.no_grad():
        state = drafter.start(Context(target, prompt, lengths, torch.tensor(ids[-1:]), states))
        return StaticTree.chain(steps).build(drafter, state, steps).tokens_BN[0, 1:].tolist()


def agrees(engine, drafter: TrainedDrafter, target: Target) -> None:
    with torch.no_grad():
        drafted = [engine.drafts(target.stock, ids, STEPS) for ids in PROMPTS]
    assert drafted == [ours(drafter, target, ids) for ids in PROMPTS]


def exported(drafter: TrainedDrafter, target: Target, form: str, folder: Path) -> Path:
    with torch.no_grad():
        write(FORMATS[form].exported(drafter, target), folder / form)
    return folder / form


def returns(folder: Path, drafter: TrainedDrafter, target: Target) -> TrainedDrafter:
    """The export comes back as a drafter that drafts the same."""
    back = load_pretrained(folder, target)
    assert isinstance(back, TrainedDrafter) and type(back) is type(drafter)
    assert [ours(back, target, ids) for ids in PROMPTS] == [
        ours(drafter, target, ids) for ids in PROMPTS
    ]
    return back


# -- Medusa ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm_head", ["own", "shared"])
@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
@pytest.mark.parametrize("blocks", [1, 2])
def test_medusa_drafts_the_same_in_vllm(target, tmp_path, lm_head, vocabulary, blocks):
    drafter = shaken(Medusa(target.shape, 3, blocks, lm_head, vocabulary), target)
    folder = exported(drafter, target, "medusa", tmp_path)
    agrees(engines.VllmMedusa(folder), drafter, target)
    assert len(set(sum((ours(drafter, target, ids) for ids in PROMPTS), []))) > 3
    returns(folder, drafter, target)


@pytest.mark.parametrize("lm_head", ["own", "shared"])
@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
def test_medusa_drafts_the_same_in_the_reference(target, tmp_path, lm_head, vocabulary):
    drafter = shaken(Medusa(target.shape, 3, 1, lm_head, vocabulary), target)
    folder = exported(drafter, target, "medusa_reference", tmp_path)
    for weights in ("medusa_lm_head.pt", "medusa_lm_head.safetensors"):
        agrees(engines.ReferenceMedusa(folder, 128, 32, weights), drafter, target)
    returns(folder, drafter, target)
    (folder / "medusa_lm_head.safetensors").unlink()
    with pytest.raises(
        ValueError, match="holds its weights as medusa_lm_head.pt only, a pickle, .*: convert it"
    ):
        load_pretrained(folder, target)


def test_the_reference_would_make_one_of_several_blocks(target):
    with pytest.raises(
        ValueError, match="blocks is 2: the reference implementation repeats one block"
    ):
        FORMATS["medusa_reference"].exported(Medusa(target.shape, 3, 2), target)


def test_tokens_outside_the_draft_vocabulary_are_never_the_likeliest(
    target,
):
    drafter: Any = shaken(Medusa(target.shape, 3, draft_vocabulary=DRAFTED), target)
    rows, vocabulary = drafter.lm_heads[0].weight, drafter.vocabulary_D
    assert vocabulary is not None
    whole = FORMATS["medusa"].whole_vocabulary(rows, vocabulary, 128)
    hidden = torch.linalg.lstsq(rows[:20].double(), -torch.ones(20, 1).double()).solution[:, 0]
    logits = whole @ torch.stack([hidden, *torch.randn(200, 32).double()]).T
    assert all(int(token) in set(vocabulary.tolist()) for token in logits.argmax(0))


# -- EAGLE-3 ---------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"fc_norm": True},
    {"norm_output": True},
    {"norm_before_residual": True},
    {"fused_layers": [6, 1, 4, 2], "fc_norm": True},
    {"fused_layers": [5]},
    {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
    {"fused_layers": [6, 1, 4], "norm_before_fc": True, "qk_norm": True, "window": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
def test_eagle3_drafts_the_same_in_vllm(target, tmp_path, options, vocabulary):
    drafter = shaken(Eagle3(target.shape, vocabulary, **options), target)
    folder = exported(drafter, target, "speculators", tmp_path)
    agrees(engines.VllmSpeculators(folder, LAYERS), drafter, target)
    assert returns(folder, drafter, target).draft_size == drafter.draft_size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fc_norm": True, "norm_output": True},
        {"fused_layers": [6, 1, 4]},
        {"fused_layers": [6, 1, 4], "norm_before_fc": True, "norm_output": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [None, DRAFTED])
def test_eagle3_drafts_the_same_in_sglang(target, tmp_path, options, vocabulary):
    drafter = shaken(Eagle3(target.shape, vocabulary, **options), target)
    folder = exported(drafter, target, "sglang", tmp_path)
    agrees(engines.Sglang(folder, LAYERS), drafter, target)
    if vocabulary:
        agrees(engines.VllmFlat(folder, LAYERS), drafter, target)
    returns(folder, drafter, target)


def test_query_norms_and_attention_biases_reach_vllm(qwen, tmp_path):
    drafter = shaken(Eagle3(replace(qwen.shape, attention_bias=True), DRAFTED), qwen)
    folder = exported(drafter, qwen, "speculators", tmp_path)
    agrees(engines.VllmSpeculators(folder, LAYERS), drafter, qwen)
    returns(folder, drafter, qwen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_before_residual": True}, "norm_before_residual is true: SGLang adds"),
        ({"window": 64}, "window is 64: SGLang runs drafter layers over all of the text"),
        ({"qk_norm": True}, "qk_norm: SGLang"),
        ({"fused_layers": [5]}, "SGLang fuses two states or more"),
        ({"fused_layers": [0, 2, 5]}, r"none before the first layer \(0\)"),
        ({"fused_layers": [2, 2, 5]}, "name a state twice"),
    ],
)
def test_what_sglang_would_read_otherwise_is_refused(target, options, words):
    with pytest.raises(ValueError, match=words):
        FORMATS["sglang"].exported(Eagle3(target.shape, **options), target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias: SGLang .* would drop the tensors silently"),
        ({"qk_norm": True}, "qk_norm: SGLang"),
        ({"activation": "gelu"}, "activation 'gelu': engines"),
    ],
)
def test_layers_that_sglang_does_not_have_are_refused(target, change, words):
    with pytest.raises(ValueError, match=words):
        FORMATS["sglang"].exported(Eagle3(replace(target.shape, **change)), target)


def test_layer_ids_are_written_as_each_engine_counts(target):
    config = FORMATS["sglang"].exported(Eagle3(target.shape), target).config
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]


# -- EAGLE-1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "bias", "readers"),
    [
        ("eagle", False, ["official", "vllm"]),
        ("eagle", True, ["official", "sglang"]),
        ("eagle_sglang", False, ["official", "sglang"]),
        ("eagle_sglang", True, ["official", "sglang"]),
    ],
)
def test_eagle_drafts_the_same_in_engines(target, tmp_path, form, bias, readers):
    drafter = shaken(Eagle(target.shape, bias=bias), target)
    folder = exported(drafter, target, form, tmp_path)
    for reader in readers:
        agrees(engines.EagleEngine(folder, reader), drafter, target)
    returns(folder, drafter, target)


def test_a_bias_and_a_trimmed_vocabulary_are_told(target):
    notes = FORMATS["eagle"].exported(Eagle(target.shape, DRAFTED, bias=True), target).notes
    assert "which vLLM refuses" in notes[0] and "this project from 40" in notes[1]


# -- a language model ------------------------------------------------------------------------------


def independent(target: Target, layers: int = 3, **arguments) -> Independent:
    drafter = Independent(target.shape, layers=layers, draft_length=STEPS, **arguments)
    drafter.initialise(target)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return drafter.double().eval()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_language_model_is_a_plain_folder_that_its_library_drafts_with(arch, tmp_path):
    """Hugging Face's own greedy continuation is the chain; embeddings tied or not come back."""
    target = tiny_target(arch, layers=4)
    drafter = independent(target)
    folder = exported(drafter, target, "hf", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for ids in PROMPTS:
        written = list(ids)
        for _ in range(STEPS):
            written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
        assert written[len(ids) :] == ours(drafter, target, ids)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == target.tokenizer.get_vocab()
    back = returns(folder, drafter, target)
    assert {k: v.shape for k, v in back.state_dict().items()} == {
        k: v.shape for k, v in drafter.state_dict().items()
    }


def test_a_plain_model_cannot_say_which_tokens_it_was_never_taught(target):
    with pytest.raises(
        ValueError, match="draft_vocabulary is 40: a plain model drafts from all tokens"
    ):
        FORMATS["hf"].exported(Independent(target.shape, draft_vocabulary=DRAFTED), target)


def test_a_plain_model_of_one_layer_is_not_taken_for_an_eagle_drafter(target, tmp_path):
    drafter = independent(target, layers=1)
    loaded = load_pretrained(exported(drafter, target, "hf", tmp_path), target)
    assert type(loaded) is Independent
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in drafter.state_dict().items()
    )


def test_a_plain_model_of_another_tokenizer_or_with_other_tensors_is_refused(target, tmp_path):
    folder = exported(independent(target), target, "hf", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        ({**tensors, "score.weight": torch.zeros(1)}, "score.weight has no place"),
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            load_pretrained(folder, target)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"<30>"', '"<other>"'))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() != target.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="has another tokenizer than the target"):
        load_pretrained(folder, target)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(target, tmp_path) -> Path:
    drafter = shaken(Eagle3(target.shape, DRAFTED), target)
    return save_pretrained(drafter, tmp_path / "run" / "drafter", Provenance.of(target)).parent


def test_the_command_writes_a_folder_and_says_how_to_serve_it(
    run, target, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("checkpoints.export.load_target", lambda name, device: target)
    out = tmp_path / "out"
    assert command(["--format", "speculators", str(run), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f'"model": "{out}"' in printed and "vllm serve tiny-llama" in printed
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    command(["--format", "sglang", str(run), str(tmp_path / "other")])
    assert format_of(json.loads((tmp_path / "other" / "config.json").read_text())) == "sglang"


def test_what_cannot_be_exported_is_refused_before_the_target_is_loaded(run, target, tmp_path):
    with pytest.raises(
        ValueError, match="--format medusa holds no Eagle3: use speculators or sglang"
    ):
        export(run, "medusa", tmp_path / "out")
    for number, kind in enumerate((Fspad, Medusa2)):
        folder = tmp_path / str(number)
        save_pretrained(kind(target.shape), folder, Provenance.of(target))
        with pytest.raises(
            ValueError, match=f"no engine serves {kind.__name__}: use this project's decoder"
        ):
            export(folder, "eagle", tmp_path / "out")
    with pytest.raises(ValueError, match="exists: give a new folder"):
        export(run, "sglang", run, target)
    with pytest.raises(ValueError, match="was trained for tiny-llama with weights"):
        export(run, "sglang", tmp_path / "out", tiny_target(layers=LAYERS, seed=1))
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(run, target, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "checkpoints.export.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        export(run, "speculators", tmp_path / "out", target)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_training_can_start_from_an_export(run, target, tmp_path):
    export(run, "speculators", tmp_path / "out", target)
    fresh = Eagle3(target.shape, DRAFTED)
    warm_start(fresh, tmp_path / "out")
    saved: Any = load_pretrained(run, target)
    assert torch.equal(fresh.lm_head.weight, saved.lm_head.weight.float())
    assert (
        torch.equal(fresh.vocabulary, saved.vocabulary) and fresh.fc.weight.dtype == torch.float32
    )

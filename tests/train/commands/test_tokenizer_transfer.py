"""Tokenizer transfer on a tiny model: both stages lower their losses, the folder is a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from modules.target.loading import load_target
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, load_network, save_network
from modules.tokenization.transfer.sampled_tokenizers import TokenizerSampler
from tests.modules.tokenization.folders import BASE, TEXTS, bpe, model_folder
from train.lightning.steps import fit_steps
from train.tokenizer_transfer.__main__ import CLIP, TransferSettings, transfer
from train.tokenizer_transfer.result import (
    bits_per_byte,
    mean_tables,
    original_tables,
    predicted_tables,
)
from train.tokenizer_transfer.stages import IdentityStage, TransferStage

NEW = bpe(["caterpillar times over the mat, " * 4], 275)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt its text in its own tokenizer."""
    return model_folder(tmp_path_factory.mktemp("base"), 60)


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Base:
    return Base(load_target(str(base_folder), "float32", "cpu"))


def test_the_losses_are_the_models_own(base: Base) -> None:
    """With its own embeddings, against the stock model."""
    ids = BASE(TEXTS[0], return_tensors="pt").input_ids
    table, head, bias = original_tables(base)
    losses = base.losses(ids, table, head, bias)
    logits = base.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None])[..., 0]
    assert torch.allclose(losses, expected, atol=1e-5)
    padded = torch.cat([ids, torch.full((1, 3), -1)], 1)
    assert torch.allclose(base.losses(padded, table, head, bias)[:, : losses.shape[1]], losses)
    assert base.losses(padded, table, head, bias)[:, losses.shape[1] :].abs().sum() == 0
    bits, tokens = bits_per_byte(base, (table, head, bias), BASE, [TEXTS[0]], 64)
    skipped = len(BASE.decode(ids[0, :1]).encode())
    size = len(TEXTS[0].encode()) - skipped
    assert bits == pytest.approx(float(expected.sum()) / 0.6931472 / size, rel=1e-4)
    assert tokens == pytest.approx((ids.shape[1] - 1) / size)


def test_both_stages_help_and_the_folder_is_an_ordinary_model(
    base_folder: Path, tmp_path: Path
) -> None:
    tokenizer_folder, text = tmp_path / "new", tmp_path / "text.txt"
    NEW.save_pretrained(tokenizer_folder)
    text.write_text("".join(TEXTS * 4))
    settings = TransferSettings(
        str(tokenizer_folder),
        str(base_folder),
        str(text),
        held_out=0.2,
        width=32,
        heads=2,
        layers=1,
        identity_steps=150,
        identity_lr=1e-2,
        identity_tokens=290,
        steps=40,
        lr=3e-3,
        batch=1,
        length=48,
        vocabulary=300,
        negatives=64,
    )
    (tmp_path / "run").mkdir()
    figures = transfer(settings, tmp_path / "run")
    bits = {name.removeprefix("bits_per_byte_"): value for name, value in figures.items()}
    # The base tokenizer in: nearly the original; a new one: better than the mean of its pieces.
    assert bits["identity_own_tokenizer"] < 1.5 * bits["original"] + 0.3
    assert bits["transferred"] < bits["mean_of_pieces"]
    folder = tmp_path / "run" / "model"
    made = LlamaForCausalLM.from_pretrained(folder)
    assert made.get_input_embeddings().weight.shape[0] == len(NEW.get_vocab())
    again: Any = AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == NEW.get_vocab()
    special = made.get_input_embeddings().weight[NEW.eos_token_id]
    original = LlamaForCausalLM.from_pretrained(base_folder).get_input_embeddings().weight
    assert torch.equal(special, original[BASE.eos_token_id])


def test_after_the_identity_stage_the_base_tokenizer_has_its_embeddings_back(base: Base) -> None:
    """As the paper wants it: cosines above 0.9, the loss within a few percent."""
    torch.manual_seed(0)
    network, steps = Hypernetwork(base.embedding, base.head, 64, 1, 2), 250
    stage = IdentityStage(network, base, 5e-3, 20, steps, tokens=290, seed=0)
    fit_steps(stage, DataLoader(TensorDataset(torch.zeros(steps))), steps, CLIP)
    tables = predicted_tables(network.eval(), base, BASE, len(base.embedding))
    cosines = torch.cosine_similarity(tables[0], base.embedding, dim=-1)
    assert float(cosines.mean()) > 0.9
    original, _ = bits_per_byte(base, original_tables(base), BASE, TEXTS[:2], 64)
    found, _ = bits_per_byte(base, tables, BASE, TEXTS[:2], 64)
    assert found < 1.05 * original + 0.02


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_precision_is_the_trainings(base: Base, precision: Any) -> None:
    seen = []

    class Noted(IdentityStage):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().training_step(batch, index)

    network = Hypernetwork(base.embedding, base.head, 32, 1, 2)
    stage = Noted(network, base, 1e-2, 0, 2, tokens=64, seed=0)
    fit_steps(stage, DataLoader(TensorDataset(torch.zeros(2))), 2, CLIP, precision)
    assert seen == [precision == "bf16-mixed"] * 2


def test_models_that_cannot_be_transferred_are_refused(base: Base) -> None:
    scaled = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            vocab_size=290,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=None,
        )
    )
    there: Any = SimpleNamespace(stock=scaled, tokenizer=BASE, name="scaled")
    with pytest.raises(ValueError, match="'scaled' scales its embeddings: not supported"):
        Base(there)
    target = base.target
    target.stock.config.final_logit_softcapping = 30.0
    try:
        with pytest.raises(ValueError, match="has final_logit_softcapping"):
            Base(target)
    finally:
        target.stock.config.final_logit_softcapping = None
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"vocabulary": 200}, "vocabulary must be at least 256, got 200"),
        ({"length": 1}, "length must be at least 2"),
        ({"buffer": 0}, "buffer must be at least 1"),
        ({"negatives": -1}, "negatives must be at least 0"),
        ({"held_out": 1.5}, "held_out must be between 0 and 1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 7}, "width 512 must be an even multiple of heads, got 7 heads"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"identity_lr": -1.0}, "identity_lr must be above 0, got -1.0"),
        ({"residual": True, "identity_steps": 5}, "identity_steps must be 0 with residual, got 5"),
    )
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            TransferSettings("x", **wrong)


def ending(*special: str, **roles: str) -> Any:
    """A tokenizer of bytes with these special tokens, the first ones of its vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=270,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(special),
            show_progress=False,
        ),
    )
    roles = {f"{role}_token": name for role, name in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


CHAT = ending("<text>", "<turn>", "</turn>", eos="</turn>", bos="<turn>", pad="</turn>")
OTHER_CHAT = ending("<new>", "<text>", "<turn>", "</turn>", eos="</turn>", pad="<text>")
ONE_TOKEN = ending("<text>", eos="<text>", bos="<text>", unk="<text>", pad="<text>")
BASE_CHAT = ending("<text>", "</turn>", eos="<text>")
NAMED = ending("<begin>", "<end>", "<pad>", eos="<end>", bos="<begin>", pad="<pad>")


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        # What pads one vocabulary is a token of another use in the other.
        (CHAT, OTHER_CHAT, {"<text>": "<text>", "<turn>": "<turn>", "</turn>": "</turn>"}),
        (OTHER_CHAT, CHAT, {"<text>": "<text>", "<turn>": "<turn>", "</turn>": "</turn>"}),
        # An end token of another name in the base stays that where the base's end has a namesake.
        (OTHER_CHAT, BASE_CHAT, {"<text>": "<text>", "</turn>": "</turn>"}),
        # A token of all roles ends texts above all.
        (NAMED, ONE_TOKEN, {"<text>": "<end>"}),
        (CHAT, ONE_TOKEN, {"<text>": "</turn>"}),
        (ONE_TOKEN, NAMED, {"<begin>": "<text>", "<end>": "<text>"}),
        (NAMED, NAMED, {"<begin>": "<begin>", "<end>": "<end>", "<pad>": "<pad>"}),
    ],
)
def test_special_tokens_have_the_embeddings_of_their_namesakes(
    old: Any, new: Any, wanted: dict[str, str]
) -> None:
    table = torch.arange(270.0)[:, None]
    base: Any = SimpleNamespace(
        tables=[table],
        embedding=table,
        source_TS=table,
        target=SimpleNamespace(tokenizer=old),
    )
    for rows in mean_tables(base, new, 270)[:2]:
        kept = {name: float(rows[new.get_vocab()[name]]) for name in wanted}
        assert kept == {name: old.get_vocab()[origin] for name, origin in wanted.items()}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_the_network_is_where_the_model_is(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was read, and after Lightning has put it on the CPU."""
    network = Hypernetwork(base.embedding, base.head, 16, 1, 2)
    save_network(network, tmp_path)
    table = base.embedding.to("meta")
    loaded = load_network(tmp_path, table, None)
    assert {weights.device.type for weights in loaded.state_dict().values()} == {"meta"}
    seen = []

    def all_of(source: torch.Tensor, pieces: torch.Tensor) -> Any:
        seen.extend({weights.device.type for weights in network.state_dict().values()})
        rows = source.new_zeros(len(pieces), source.shape[1])
        return rows, rows, None

    monkeypatch.setattr(network, "all_of", all_of)
    there: Any = SimpleNamespace(tables=[table], source_TS=table, target=base.target)
    predicted_tables(network, there, NEW, len(NEW))
    assert seen == ["meta"]


@pytest.mark.parametrize("texts", [["a", ""], [""], ["", TEXTS[0]]])
def test_texts_without_a_second_token_teach_nothing(
    base: Base, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Hypernetwork(base.embedding, base.head, 16, 1, 2)
    drawn = TokenizerSampler(TEXTS, 300)
    stage = TransferStage(
        network, base, 1e-3, 1, 9, sampler=drawn, lexical=0, negatives=9, every=1, length=16, seed=0
    )
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(stage, "log_dict", lambda values, **_: logged.update(values))
    stage.training_step(texts, 0).backward()
    modelling = float(logged["modelling"].detach())
    assert modelling > 0 if TEXTS[0] in texts else modelling == 0
    gradients = [weights.grad for weights in network.parameters() if weights.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)

"""Targets whose embedding is narrower than their layers (OPT-350m): refused by name, or drafted for
by a model.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from data.datamodule import ConversationData
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.target.target import Target
from tests.fakes import tiny_tokenizer
from train.run import Recipe, build


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["opt"](
        vocab_size=128,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    model: Any = AutoModelForCausalLM
    return Target(model.from_config(config).double(), tiny_tokenizer(), "tiny-projected")


def recipe(kind: Any, conversations: Path, **arguments: Any) -> Recipe:
    data = ConversationData(str(conversations), validation_fraction=0.2, max_length=64)
    return Recipe(lambda shape: kind(shape, **arguments), data)


@pytest.mark.parametrize("kind", [Medusa, Clover, Eagle3, S2D])
def test_drafters_on_its_states_are_refused_before_data_are_read(
    kind: Any, target: Target, conversations: Path
) -> None:
    asked = recipe(kind, conversations)
    with pytest.raises(
        ValueError,
        match=f"'tiny-projected' projects states of 32 .* {kind.__name__} does not support",
    ):
        build(asked, target)
    assert not asked.data.documents


def test_a_model_of_its_own_drafts_for_it(target: Target, conversations: Path) -> None:
    asked = recipe(Independent, conversations, layers=1)
    made = build(asked, target).double()
    assert isinstance(made, Independent)
    batch = next(iter(asked.data.val_dataloader()))
    assert bool(made.loss(batch, target, 0.0).total.isfinite())
    plain, drafted = (
        SpeculativeDecoder(target, drafter).decode([[7, 8, 9]], Sampling(), 12)[0].ids
        for drafter in (None, made.eval())
    )
    assert plain == drafted

"""Drafters in the formats of others, made by hand as their documentation names tensors and shapes,
and wrong ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints.pretrained
from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained, warm_start
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.drafters.heads.hydra import Hydra
from modules.drafters.heads.medusa import Medusa
from modules.target.target import Target
from tests.fakes import tiny_target

LAYERS, V, D = 8, 128, 40


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=LAYERS, dtype=torch.float32)


def llama(target: Target, **more: Any) -> dict[str, Any]:
    """A one-layer Llama config of the target's dimensions, in the old spelling."""
    shape = target.shape
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": V,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": False,
        **more,
    }


def layer(target: Target, prefix: str, width: int) -> dict[str, Tensor]:
    """Random tensors of a Llama layer whose attention reads `width` times the hidden size."""
    shape = target.shape
    size, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes = {
        "self_attn.q_proj": (queries, width * size),
        "self_attn.k_proj": (keys, width * size),
        "self_attn.v_proj": (keys, width * size),
        "self_attn.o_proj": (size, queries),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
        "post_attention_layernorm": (size,),
    }
    return {
        f"{prefix}.{name}.weight": torch.randn(dimensions) for name, dimensions in shapes.items()
    }


def eagle3(target: Target, prefix: str) -> dict[str, Tensor]:
    """EAGLE-3's tensors with a draft vocabulary of every third token."""
    size, ids = target.shape.hidden_size, 3 * torch.arange(D)
    marked = torch.zeros(V, dtype=torch.bool)
    marked[ids] = True
    norms = {
        f"{prefix}.{name}.weight": torch.randn(size) for name in ("input_layernorm", "hidden_norm")
    }
    return {
        "embed_tokens.weight": target.embed(torch.arange(V)).clone(),
        "fc.weight": torch.randn(size, 3 * size),
        "norm.weight": torch.randn(size),
        "lm_head.weight": torch.randn(D, size),
        **norms,
        **layer(target, prefix, 2),
        "d2t": ids - torch.arange(D),
        "t2d": marked,
    }


def speculators(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    verifier = {"name_or_path": "tiny-llama", "architectures": ["LlamaForCausalLM"]}
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": D,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
        "transformer_layer_config": llama(target),
        "target_hidden_size": None,
        "speculators_config": {"algorithm": "eagle3", "verifier": verifier},
    }, eagle3(target, "layers.0")


def speculators_by_default(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What speculators 0.9 trains where nothing is said: EAGLE-3.1, without embeddings."""
    config, tensors = speculators(target)
    size = target.shape.hidden_size
    flags = {"norm_before_fc": True, "norm_output": True, "fc_norm": False}
    layer = {"layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 6}
    config |= {"model_type": "speculators", "speculators_version": "0.9.0", **flags}
    config["transformer_layer_config"] |= {"num_aux_hidden_states": 3, **layer}
    del tensors["embed_tokens.weight"]
    return config, {**tensors, "input_norm.weight": torch.randn(3 * size)}


def sglang(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    eagle_config = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 3, 5]}
    config = llama(
        target,
        architectures=["LlamaForCausalLMEagle3"],
        draft_vocab_size=D,
        eagle_config=eagle_config,
    )
    return config, eagle3(target, "midlayer")


def eagle(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = target.shape.hidden_size
    return llama(target, bias=False), {
        "embed_tokens.weight": target.embed(torch.arange(V)).clone(),
        "fc.weight": torch.randn(size, 2 * size),
        **layer(target, "layers.0", 1),
    }


def medusa(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = target.shape.hidden_size
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": size,
        "vocab_size": V,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "truncated_vocab_size": None,
        "medusa_fc_bias": True,
        "original_lm_head": False,
    }
    tensors = {
        f"blocks.{head}.layers.0.{part}": torch.randn(shape)
        for head in range(2)
        for part, shape in (("weight", (size, size)), ("bias", (size,)))
    }
    return config, tensors | {f"lm_heads.{head}.weight": torch.randn(V, size) for head in range(2)}


def reference(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = target.shape.hidden_size
    config = {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "tiny-llama",
    }
    tensors = {
        f"{head}.0.linear.{part}": torch.randn(shape)
        for head in range(2)
        for part, shape in (("weight", (size, size)), ("bias", (size,)))
    }
    return config, tensors | {f"{head}.1.weight": torch.randn(V, size) for head in range(2)}


MADE = {
    "speculators": (speculators, Eagle3),
    "speculators_by_default": (speculators_by_default, Eagle3),
    "sglang": (sglang, Eagle3),
    "eagle": (eagle, Eagle),
    "medusa": (medusa, Medusa),
    "reference": (reference, Medusa),
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize("name", MADE)
def test_a_drafter_made_by_hand_is_imported_and_can_be_trained_further(target, tmp_path, name):
    make, kind = MADE[name]
    folder = write(tmp_path / name, *make(target))
    drafter = load_pretrained(folder, target)
    assert type(drafter) is kind
    arguments = {key: value for key, value in drafter.arguments.items() if key != "shape"}
    fresh = kind(target.shape, **arguments)
    warm_start(fresh, folder)
    expected = drafter.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in fresh.state_dict().items())


def test_what_speculators_trains_by_default_is_eagle_31(target, tmp_path):
    folder = write(tmp_path / "made", *speculators_by_default(target))
    drafter = load_pretrained(folder, target)
    assert isinstance(drafter, Eagle3) and drafter.norm_before_residual and drafter.norm_output
    assert drafter.input_norm is not None and drafter.fc_norm is None and drafter.window == 6
    assert torch.equal(
        drafter.input_norm.weight, load_file(folder / "model.safetensors")["input_norm.weight"]
    )


def test_a_layer_is_of_its_own_type_and_its_window_can_be_off(target, tmp_path):
    config, tensors = speculators_by_default(target)
    layer, size = config["transformer_layer_config"], target.shape.head_dim
    config["transformer_layer_config"] = {
        **layer,
        "model_type": "qwen3",
        "layer_types": ["full_attention"],
    }
    tensors |= {f"layers.0.self_attn.{n}_norm.weight": torch.rand(size) for n in "qk"}
    drafter = load_pretrained(write(tmp_path / "made", config, tensors), target)
    assert drafter.window is None and drafter.layer.shape.qk_norm
    assert torch.equal(drafter.attention.q_norm.weight, tensors["layers.0.self_attn.q_norm.weight"])


def test_layer_ids_norms_and_offsets_are_read_as_the_engine_does(target, tmp_path):
    config, tensors = speculators(target)
    drafter = load_pretrained(write(tmp_path / "vllm", config, tensors), target)
    assert (
        isinstance(drafter, Eagle3)
        and drafter.fused_layers == [1, 4, 6]
        and drafter.norm_before_residual
    )
    assert torch.equal(drafter.vocabulary, 3 * torch.arange(D)) and torch.equal(
        drafter.lm_head.weight, tensors["lm_head.weight"]
    )
    del config["norm_before_residual"]
    assert load_pretrained(
        write(tmp_path / "default", config, tensors), target
    ).norm_before_residual
    other = load_pretrained(write(tmp_path / "sglang", *sglang(target)), target)
    assert (
        isinstance(other, Eagle3)
        and other.fused_layers == [1, 4, 6]
        and not other.norm_before_residual
    )


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("speculators", "layers.0.hidden_norm.weight"),
        ("speculators_by_default", "input_norm.weight"),
        ("sglang", "midlayer.self_attn.q_proj.weight"),
        ("eagle", "fc.weight"),
        ("medusa", "blocks.1.layers.0.bias"),
        ("reference", "1.1.weight"),
    ],
)
def test_wrong_tensors_are_refused_by_name(target, tmp_path, name, tensor):
    config, tensors = MADE[name][0](target)
    missing = {key: value for key, value in tensors.items() if key != tensor}
    shaped = {**tensors, tensor: torch.zeros(3, 5)}
    for case, found, words in (
        ("missing", missing, "is missing"),
        ("shaped", shaped, r"has shape \(3, 5\)"),
        ("more", {**tensors, "extra.weight": torch.zeros(1)}, "has no place"),
    ):
        with pytest.raises(
            ValueError, match=f"{'extra.weight' if case == 'more' else tensor} {words}"
        ):
            load_pretrained(write(tmp_path / case, config, found), target)


def test_offsets_that_lead_nowhere_and_foreign_embeddings_are_refused(target, tmp_path):
    config, tensors = speculators(target)
    with pytest.raises(
        ValueError, match="d2t does not lead to 40 different ids below 128: it must hold offsets"
    ):
        load_pretrained(
            write(tmp_path / "ids", config, {**tensors, "d2t": 3 * torch.arange(D) + 90}), target
        )
    with pytest.raises(
        ValueError, match="embed_tokens.weight differs from the embeddings of tiny-llama"
    ):
        load_pretrained(
            write(
                tmp_path / "embed", config, {**tensors, "embed_tokens.weight": torch.randn(V, 32)}
            ),
            target,
        )


@pytest.mark.parametrize(
    "token_map", [torch.arange(D) + V - D + 1, torch.arange(D) - 1, torch.arange(D) // 2]
)
def test_a_token_map_with_ids_beyond_the_vocabulary_or_twice_is_refused(
    target, tmp_path, token_map
):
    config, tensors = medusa(target)
    config |= {"truncated_vocab_size": D, "original_lm_head": True}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_heads")}
    tensors["lm_heads.0.weight"] = torch.randn(D, target.shape.hidden_size)
    right = load_pretrained(
        write(tmp_path / "right", config, {**tensors, "token_map": 3 * torch.arange(D)}), target
    )
    assert torch.equal(right.state_dict()["vocabulary"], 3 * torch.arange(D))
    with pytest.raises(ValueError, match="token_map does not hold 40 different ids below 128"):
        load_pretrained(
            write(tmp_path / "wrong", config, {**tensors, "token_map": token_map}), target
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"speculators_model_type": "mtp"}, "speculators_model_type is 'mtp': only 'eagle3'"),
        (
            {"speculators_model_type": "peagle"},
            "is not a whole peagle_speculators config: KeyError 'mask_token_id'",
        ),
        ({"norm_before_fc": True, "fc_norm": True}, "fc_norm and norm_before_fc are both true"),
        ({"parallel_drafting": True}, "parallel_drafting is set, which is not supported"),
        (
            {"draft_vocab_size": None, "transformer_layer_config": {}},
            "is not a whole speculators config",
        ),
    ],
)
def test_configs_that_ask_for_something_else_are_refused(target, tmp_path, change, words):
    config, tensors = speculators(target)
    with pytest.raises(ValueError, match=words):
        load_pretrained(write(tmp_path / "drafter", {**config, **change}, tensors), target)


def keys(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where the values of a config are."""
    inner = [(key, *more) for key, value in config.items() for more in _below(value)]
    return [(key,) for key in config] + inner


def _below(value: Any) -> list[tuple[str, ...]]:
    return keys(value) if isinstance(value, dict) else []


def put(config: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    *outer, last = place
    whole = json.loads(json.dumps(config))
    inner = whole
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return whole


@pytest.mark.parametrize("value", [None, True, -1, 0.5, 10**30, "x", [[1]], {"a": 1}], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_any_value_anywhere_in_a_config_is_read_or_refused_in_a_line(target, tmp_path, name, value):
    config, tensors = MADE[name][0](target)
    folder = write(tmp_path / name, config, tensors)
    refused = []
    for place in keys(config):
        (folder / "config.json").write_text(json.dumps(put(config, place, value)))
        try:
            load_pretrained(folder, target)
        except ValueError as error:
            refused.append(place)
            assert str(folder) in str(error) or "drafter.model" in str(error), place
            assert len(str(error)) < 600
    assert len(refused) >= 2


def test_training_never_starts_from_other_rotary_parameters(target, tmp_path):
    config, tensors = sglang(target)
    folder = write(tmp_path / "drafter", {**config, "rope_theta": 5e5}, tensors)
    fresh = Eagle3(target.shape, D, [1, 4, 6])
    with pytest.raises(
        ValueError, match="was trained with rotary parameters .*500000.*: it would start wrong"
    ):
        warm_start(fresh, folder)


def test_a_format_of_others_needs_its_target(target, tmp_path):
    with pytest.raises(ValueError, match="load it with its target"):
        load_pretrained(write(tmp_path / "drafter", *medusa(target)))


@pytest.mark.parametrize("kind", [Eagle, Fspad, Falcon, Hydra])
def test_a_drafter_of_version_1_reads_embeddings_as_they_are(kind, target, tmp_path):
    """Version 1 had no `token_scale`: what it saved drafts as it did."""
    torch.manual_seed(0)
    drafter = kind(target.shape).double()
    drafter.initialise(target)
    assert drafter.token_scale != 1
    saved = save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "format_version": 1}))
    tensors = load_file(saved / "model.safetensors")
    del tensors["token_scale"]
    save_file(tensors, saved / "model.safetensors", {"aliases": "{}"})
    loaded = load_pretrained(saved, target)
    assert loaded.token_scale == 1
    for name, tensor in tensors.items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_an_older_version_is_migrated(target, tmp_path, monkeypatch):
    """As a later release would: this version called the number of heads `count`."""
    saved = save_pretrained(Medusa(target.shape, 2), tmp_path / "drafter", Provenance.of(target))
    config = json.loads((saved / "config.json").read_text())
    config["arguments"]["count"] = config["arguments"].pop("heads")
    (saved / "config.json").write_text(json.dumps(config))

    def renamed(
        config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        arguments = dict(config["arguments"])
        arguments["heads"] = arguments.pop("count")
        return {**config, "arguments": arguments}, tensors

    migrations = checkpoints.pretrained.MIGRATIONS
    monkeypatch.setattr(checkpoints.pretrained, "MIGRATIONS", (*migrations, renamed))
    monkeypatch.setattr(checkpoints.pretrained, "FORMAT_VERSION", len(migrations) + 2)
    assert load_pretrained(saved, target).arguments["heads"] == 2

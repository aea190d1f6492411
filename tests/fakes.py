"""Tiny random models, a tokenizer made in memory, and drafters that are always, never or sometimes
right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Drafter, DraftState
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import Decoder
from modules.target.architecture import reads_images
from modules.target.seq2seq.target import Seq2SeqTarget
from modules.target.target import Target
from tests.architectures import ARCHITECTURES, DIMENSIONS, MORE, RECURRENT, REFUSED, SEEING

_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz .,?!:;'0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ\n-+=()"


def tiny_tokenizer(vocab: int = 128) -> PreTrainedTokenizerFast:
    """One token per character, a chat template, end of turn = id 0. Unknown characters map to
    `<unk>`.
    """
    pieces = [*_SPECIAL, *dict.fromkeys(LETTERS)]
    pieces += [f"<{i}>" for i in range(vocab - len(pieces))]
    model = models.WordLevel(
        {piece: i for i, piece in enumerate(pieces[:vocab])}, unk_token="<unk>"
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=_SPECIAL[1:4],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


SEQ2SEQ = {
    "t5": {
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 64,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 2,
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 512,
        "decoder_start_token_id": 2,
        "scale_embedding": True,
    },
}


def tiny_seq2seq(arch: str = "t5", vocab: int = 128, seed: int = 0) -> Seq2SeqTarget:
    """A random-weight encoder-decoder target in float64, whose norms and positions all matter."""
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "forced_eos_token_id": None}
    config = CONFIG_MAPPING[arch](vocab_size=vocab, **ids, **SEQ2SEQ[arch])
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.6)
            elif name.endswith("weight"):
                parameter.uniform_(0.3, 2)
            else:
                parameter.normal_(0, 0.1)
    return Seq2SeqTarget(model, tiny_tokenizer(vocab), f"tiny-{arch}")


def tiny_target(
    arch: str = "llama",
    dtype: torch.dtype = torch.float64,
    vocab: int = 128,
    layers: int = 2,
    seed: int = 0,
) -> Target:
    """A random-weight target with distributions sharp enough to be told apart, every norm with a
    gain of its own.
    """
    kind, extra = (ARCHITECTURES | MORE | RECURRENT | REFUSED | SEEING)[arch]
    dimensions = {**DIMENSIONS, "num_hidden_layers": layers} | (
        {"n_layer": layers} if arch == "gpt2" else {}
    )
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    settings = {"vocab_size": vocab, **ids, **dimensions, **extra}
    settings = {name: value for name, value in settings.items() if value is not None}
    if "text_config" in extra:
        # Dimensions are those of the text decoder.
        text = {"vocab_size": vocab, **ids, **dimensions, **extra["text_config"]}
        settings = {**extra, "text_config": text}
    config = CONFIG_MAPPING[kind](**settings)
    torch.manual_seed(seed)
    loader = AutoModelForImageTextToText if reads_images(kind) else AutoModelForCausalLM
    model = loader.from_config(config).to(dtype)
    gains = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif name.endswith("weight"):
                # A norm's gain; Gemma's norms multiply by 1 + weight.
                parameter.uniform_(0.3, 2, generator=gains).sub_(
                    1.0 if kind.startswith("gemma") else 0.0
                )
            else:
                parameter.normal_(0, 0.1, generator=gains)
    return Target(model, tiny_tokenizer(vocab), f"tiny-{arch}")


def tiny_batch(target: Target, rows: int = 2, length: int = 24, seed: int = 0) -> TextBatch:
    """Two documents a row, the second padded; the later half of each document is the
    assistant's.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, target.shape.vocab_size, (rows, length), generator=generator)
    half, end = length // 2, length - 3
    documents = torch.full((rows, length), -1)
    documents[:, :half], documents[:, half:end] = 0, 1
    positions = (
        torch.cat([torch.arange(half), torch.arange(length - half)]).expand(rows, -1).clone()
    )
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, half // 3 : half], mask[:, half + 3 : end] = True, True
    return TextBatch(ids, mask, positions, documents)


class Texts(list[list[int]]):
    """Token lists that can be selected like tensors."""

    def select(self, sequences_S: Tensor) -> Texts:
        """The texts of these sequences."""
        return Texts(self[i] for i in sequences_S.tolist())


@dataclass
class ScriptState(DraftState):
    """The text so far, per sequence."""

    text: Texts


class ScriptedDrafter(Drafter):
    """Drafts from a script: `right` = the share of drafted tokens that equal the target's own
    greedy future.

    The future is found by greedy decoding with the raw model, so the drafter is an oracle at
    `right=1.0`, always wrong at 0, and sometimes right between. `decoys` adds that many wrong
    siblings per node before the right one.
    """

    sibling_draw = SiblingDraw.BY_VALUE

    def __init__(
        self, shape: TargetShape, right: float = 1.0, depth: int = 3, decoys: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.vocab, self.right, self.depth, self.decoys = shape.vocab_size, right, depth, decoys
        self.coin = torch.Generator().manual_seed(seed)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Nothing to learn."""
        return Losses(torch.zeros((), requires_grad=True))

    def start(self, context: Context) -> DraftState:
        """Remember the prompts; the future is computed when asked for."""
        rows = zip(context.input_ids_BT.tolist(), context.lengths_B.tolist(), strict=True)
        return ScriptState(
            context, context.newest_B, context.lengths_B, Texts(ids[:n] for ids, n in rows)
        )

    def propose(self, state: ScriptState, budget: int) -> TokenTree:
        """A chain of the (possibly spoiled) future, with decoys as earlier siblings."""
        futures = [
            self._future(state.context.target, [*text, int(new)])
            for text, new in zip(state.text, state.newest_B, strict=True)
        ]
        tokens, parents = [state.newest_B.tolist()], [-1]
        trunk = 0
        for level in range(self.depth):
            for decoy in range(self.decoys):
                tokens.append([(f[level] + 1 + decoy) % self.vocab for f in futures])
                parents.append(trunk)
            tokens.append([f[level] for f in futures])
            parents.append(trunk)
            trunk = len(parents) - 1
        topology = Topology(torch.tensor(parents).expand(len(futures), -1))
        return TokenTree(torch.tensor(tokens).T.contiguous(), topology)

    def _future(self, target: Target, ids: list[int]) -> list[int]:
        drafts: list[int] = []
        for _ in range(self.depth):
            logits: Tensor = target.model(input_ids=torch.tensor([ids + drafts])).logits[0, -1]
            token = int(logits.argmax())
            if torch.rand((), generator=self.coin) >= self.right:
                token = (token + 1) % self.vocab
            drafts.append(token)
        return drafts

    def absorb(self, state: ScriptState, verified: Verified, accepted: Accepted) -> DraftState:
        """Append what was emitted."""
        emitted = accepted.emitted(verified.tree)
        text = Texts(
            [
                *ids,
                int(state.newest_B[row]),
                *emitted[row, : int(accepted.lengths_B[row]) - 1].tolist(),
            ]
            for row, ids in enumerate(state.text)
        )
        return replace(super().absorb(state, verified, accepted), text=text)


class RandomDrafter(ScriptedDrafter):
    """Drafts tokens at random: right once per vocabulary, and harmless."""

    def _future(self, target: Target, ids: list[int]) -> list[int]:
        return torch.randint(self.vocab, (self.depth,), generator=self.coin).tolist()


def ids_by_batch(
    decoder: Decoder, prompts: list[list[int]], size: int, limit: int
) -> list[list[int]]:
    """Greedy answers to all prompts, decoded `size` at once."""
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return [trace.ids for batch in batches for trace in decoder.decode(batch, Sampling(), limit)]


def many_prompts(count: int = 16) -> list[list[int]]:
    """Prompts of different lengths, some of which repeat themselves."""
    return [[7 + 3 * i + j % (2 + i % 4) for j in range(2 + i * 5 % 9)] for i in range(count)]

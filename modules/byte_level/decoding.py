"""Decoding byte by byte, with one model or with several of different vocabularies.

Phan et al. 2024 (arXiv 2410.09303): prompts that end inside of a token, gaps between two texts, and
ensembles whose distributions of the next byte are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modules.byte_level.covers import END, ByteText
from modules.byte_level.token_rows import TokenRows
from modules.byte_level.vocabulary import ByteVocabulary
from modules.contracts.sampling import Sampling, sample_probs, warped_probs
from modules.decoding.loop import Trace, check_context
from modules.decoding.lossy.several_answers import check_one_prompt
from modules.decoding.timing import Clock
from modules.target.loading import load_target
from modules.target.target import Target


@dataclass(frozen=True)
class Gap:
    """Where a text is to be filled in: tokens before, and bytes that the answer begins with."""

    before: list[int]
    begun: bytes


def fill_in_the_middle(
    target: Target, before: str, after: str, tokens: tuple[str, str, str]
) -> Gap:
    """A prompt for the text between two others (prefix, suffix, middle), cut where no word is.

    The last word before the gap, which the missing text may go on with, is taken from the prefix
    and begins the middle: a tokenizer would otherwise say that it ended there.

    Args:
        target: a model that was trained to fill in.
        before, after: the two texts.
        tokens: its special tokens for prefix, suffix and middle, such as
            `("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")`.

    Raises:
        ValueError: the tokenizer has not all of these tokens.
    """
    ids_of = target.tokenizer.get_vocab()
    absent = [token for token in tokens if token not in ids_of]
    if absent:
        raise ValueError(f"{target.name} has no token {absent[0]!r}: give a model that fills in")
    prefix, suffix, middle = (ids_of[token] for token in tokens)
    # The last word, with the spaces before it.
    word = len(before.rstrip()) if before != before.rstrip() else before.rfind(" ")
    cut = max(word, 0)
    encode = target.tokenizer.encode
    ids = [
        prefix,
        *encode(before[:cut], add_special_tokens=False),
        suffix,
        *encode(after, add_special_tokens=False),
        middle,
    ]
    return Gap(ids, before[cut:].encode())


class ByteDecoder:
    """Draws bytes one after another from the exact distribution of the next one. Lossy: where a
    model gives probability to tokens that its tokenizer would not write, that is left out, and at
    temperature 0 the likeliest byte is not always the likeliest token's.

    With other models the distributions of the next byte are averaged, whatever their vocabularies.
    They read the prompt as text, special tokens included, so that they should share the target's
    chat template.

    Args:
        target: the first model. Answers are given in its tokens.
        others: further models: Hub ids, folders, files, or loaded targets.
        weights: of all models, the target's first; by default equal.
        unchecked: as in `ByteText`.

    Raises:
        ValueError: weights that are not one per model, or negative; a tokenizer of another kind.
    """

    name = "byte_level"
    claims_lossless: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init__(
        self,
        target: Target,
        others: Sequence[str | Target] = (),
        weights: Sequence[float] | None = None,
        unchecked: float = 1e-4,
    ) -> None:
        precision, device = str(target.dtype).removeprefix("torch."), str(target.device)
        loaded = [
            other if isinstance(other, Target) else load_target(other, precision, device)
            for other in others
        ]
        self.models = [target, *loaded]
        self.weights = [1.0] * len(self.models) if weights is None else list(weights)
        if len(self.weights) != len(self.models) or min(self.weights) < 0 or not sum(self.weights):
            raise ValueError(
                f"weights must be one per model and not negative, got {self.weights} for "
                f"{len(self.models)} models"
            )
        self._vocabularies = [
            ByteVocabulary(model.tokenizer, model.shape.vocab_size) for model in self.models
        ]
        self.target, self.unchecked = target, unchecked

    def texts(self, before: Sequence[int], begun: bytes = b"") -> list[ByteText]:
        """The text in every model.

        Args:
            before: the target's tokens that stand before it, at least one.
            begun: its first bytes.
        """
        return self._begun(self._prompts(before), begun)

    def _prompts(self, before: Sequence[int]) -> list[list[int]]:
        """What stands before the text, in the tokens of every model."""
        if len(self.models) == 1:
            return [list(before)]
        prompt = self.target.tokenizer.decode(before)
        others = [
            model.tokenizer.encode(prompt, add_special_tokens=False) for model in self.models[1:]
        ]
        return [list(before), *others]

    def _begun(self, prompts: Sequence[list[int]], begun: bytes = b"") -> list[ByteText]:
        return [
            ByteText(
                TokenRows(model, ids),
                vocabulary,
                model.eos_ids,
                begun,
                begins=ids[-1] not in vocabulary.data,
                unchecked=self.unchecked,
            )
            for model, vocabulary, ids in zip(self.models, self._vocabularies, prompts, strict=True)
        ]

    def next_byte(self, texts: Sequence[ByteText]) -> Tensor:
        """Probabilities [257] of the next byte, the weighted mean over the models."""
        probs = [text.next_byte() * w for text, w in zip(texts, self.weights, strict=True)]
        return torch.stack(probs).sum(0) / sum(self.weights)

    @torch.no_grad()
    def stream(
        self, texts: Sequence[ByteText], sampling: Sampling, most: int | None = None
    ) -> Iterator[int]:
        """Bytes that go on with the texts, each appended to all of them, until the end or `most`
        bytes.
        """
        generator = torch.Generator().manual_seed(sampling.seed)
        count = 0
        while most is None or count < most:
            probs = self.next_byte(texts)
            if sampling.temperature == 0:
                byte = int(probs.argmax())
            else:
                uniform = torch.rand((), generator=generator, dtype=torch.float64)
                byte = int(sample_probs(warped_probs(probs.log(), sampling), uniform))
            if byte == END:
                return
            for text in texts:
                text.extend(bytes([byte]))
            count += 1
            yield byte

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue one prompt by at most `limit` tokens.

        Raises:
            ValueError: as `check_one_prompt`; a prompt that leaves another model no room.
        """
        # 1. Refuse what cannot be decoded; min-p is a warper.
        check_one_prompt(self.name, self.target, prompts, sampling, limit, ("min_p",))
        each = self._prompts(prompts[0])
        for model, ids in zip(self.models, each, strict=True):
            check_context(model, len(ids), limit, model.name)
        # 2. Byte by byte, as long as the answer has fewer tokens.
        trace, clock = Trace(len(prompts[0])), Clock(self.target.device)
        with clock.phase("prefill"):
            texts = self._begun(each)
        ended = True
        for _ in self.stream(texts, sampling):
            trace.time_to_first_token = trace.time_to_first_token or clock.elapsed()
            if len(texts[0].tokens) > limit:
                ended = False
                break
        # 3. The answer in the target's tokens.
        trace.ids = list(texts[0].tokens[:limit])
        if ended and len(trace.ids) < limit:
            trace.ids.append(self._end_id())
        trace.drafted = [False] * len(trace.ids)
        trace.seconds = clock.snapshot()
        return [trace]

    def _end_id(self) -> int:
        """The token that ends an answer, the tokenizer's own where it is one of several."""
        ends, usual = self.target.eos_ids, self.target.tokenizer.eos_token_id
        return usual if usual in ends else min(ends)

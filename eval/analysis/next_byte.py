"""`python -m eval.analysis.next_byte`: how well a model names the next byte of texts that are cut
inside of a token, by its exact distribution and by plain prompting.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from configs.command_line.loading import called, exit_with
from modules.byte_level.covers import END, ByteText
from modules.byte_level.token_rows import TokenRows
from modules.byte_level.vocabulary import ByteVocabulary
from modules.contracts.target import Target
from modules.runtime.files import read_text
from modules.target.loading import AUTO, load_target


@dataclass(frozen=True)
class Cut:
    """A text that ends inside of a token, and the byte that follows."""

    text: bytes
    byte: int


def cuts_inside_tokens(
    vocabulary: ByteVocabulary, texts: Sequence[str], per_text: int, draw: random.Random
) -> Iterator[Cut]:
    """Places inside of tokens, drawn without replacement; none inside of a character."""
    for text in texts:
        data = vocabulary.begin(text.encode())
        places, start = [], 0
        for i in vocabulary.encode(data) or ():
            size = len(vocabulary.data[i])
            places += [start + n for n in range(1, size) if data[start + n] & 0xC0 != 0x80]
            start += size
        # The space that SentencePiece puts before a text is no text.
        places = [place for place in places if place > vocabulary.dummy_prefix]
        for place in sorted(draw.sample(places, min(per_text, len(places)))):
            yield Cut(data[int(vocabulary.dummy_prefix) : place], data[place])


def plain_prompting(target: Target, vocabulary: ByteVocabulary, before: int, text: bytes) -> Tensor:
    """Probabilities [257] of the first byte of the next token after the text's own tokens."""
    tokens = vocabulary.encode(vocabulary.begin(text)) or ()
    ids_BT = torch.tensor([[before, *tokens]], device=target.device)
    session = target.open(1, ids_BT.shape[1])
    logits_BV, _ = session.prefill(ids_BT, torch.tensor([ids_BT.shape[1]]).to(ids_BT))
    probs_V = logits_BV[0].double().softmax(-1).cpu()
    first = torch.tensor([vocabulary.data[int(i)][0] for i in vocabulary.ids_S])
    probs = torch.zeros(END + 1, dtype=torch.double).index_add(0, first, probs_V[vocabulary.ids_S])
    probs[END] = probs_V[sorted(target.eos_ids)].sum()
    return probs


@torch.no_grad()
def measure(target: Target, cuts: Sequence[Cut], before: int) -> dict[str, tuple[float, float]]:
    """Share of next bytes that are the likeliest, and their mean log probability in bits, for
    `plain` prompting and the `exact` distribution.
    """
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    rows: dict[str, list[Tensor]] = {"plain": [], "exact": []}
    for cut in cuts:
        model = TokenRows(target, [before])
        text = ByteText(model, vocabulary, target.eos_ids, cut.text)
        rows["exact"].append(text.next_byte())
        rows["plain"].append(plain_prompting(target, vocabulary, before, cut.text))
    return {
        name: (
            fmean(int(p.argmax()) == cut.byte for p, cut in zip(probs, cuts, strict=True)),
            fmean(
                math.log2(max(float(p[cut.byte]), 1e-300))
                for p, cut in zip(probs, cuts, strict=True)
            ),
        )
        for name, probs in rows.items()
    }


def compare(
    target: str,
    texts: str,
    limit: int = 50,
    per_text: int = 4,
    seed: int = 0,
    dtype: str = AUTO,
    device: str | None = None,
) -> None:
    """Print the accuracy of the next byte by both ways.

    Args:
        target: Hub id, folder or .gguf file of a model with byte-level BPE or SentencePiece.
        texts: text file, a text per line.
        limit: number of texts, from the beginning of the file.
        per_text: cuts of each text.
        seed: of the places.
        dtype: of the target, float32, bfloat16, float16 or float64; auto is bfloat16 on a GPU that
            multiplies it and float32 elsewhere.
        device: a torch device; by default the GPU if there is one.

    Raises:
        ValueError: a count below 1, or a file that cannot be read or has no text.
    """
    for name, value in (("limit", limit), ("per_text", per_text)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    lines = read_text(Path(texts), "texts").splitlines()
    strings = [line for line in lines if line.strip()][:limit]
    if not strings:
        raise ValueError(f"texts {texts!r} has no text: give a file with a text per line")
    loaded = load_target(target, dtype, device, chats=False)
    vocabulary = ByteVocabulary(loaded.tokenizer, loaded.shape.vocab_size)
    tokenizer = loaded.tokenizer
    before = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    cuts = list(cuts_inside_tokens(vocabulary, strings, per_text, random.Random(seed)))
    if not cuts:
        raise ValueError(f"texts {texts!r} has no token of several bytes: give longer texts")
    print(f"{len(cuts)} cuts inside of tokens, {len(strings)} texts, {target}")
    for name, (right, bits) in measure(loaded, cuts, before).items():
        print(f"{name:<6} next byte right {right:.3f}, log probability {bits:.2f} bits")


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and compare; returns the exit status."""
    return called(
        compare,
        arguments,
        "eval.analysis.next_byte",
        "Compare exact next-byte probabilities with plain prompting.",
    )


if __name__ == "__main__":
    exit_with(command)

"""Long prompts whose answers are known: facts hidden in text that says nothing else, in five kinds
after RULER (Hsieh et al. 2024, arXiv 2404.06654), in words of this project; and completion of the
files of a folder.

Lengths are in tokens, estimated without a tokenizer: a word of up to nine letters, a digit, a mark,
a line break, an indentation and the space before a number count as one each. The same arguments
give the same prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE = re.compile(r"\d|[^\W\d]{1,9}|[^\w\s]|\n+| {2,}|\s(?=\d)")
_SUBJECTS = ("baker", "teacher", "gardener", "driver", "painter", "farmer", "singer", "nurse")
_VERBS = ("walked to", "wrote about", "thought of", "waited near", "looked at", "talked about")
_PLACES = ("river", "market", "station", "garden", "bridge", "harbour", "library", "square")
_TIMES = ("in the morning", "after lunch", "at night", "on Monday", "in spring", "before dinner")
_CITIES = (
    "Aber", "Brim", "Corv", "Dalen", "Estow", "Farlo", "Gorse", "Holm", "Iver", "Jarrow", "Kelso",
    "Lorn", "Morven", "Nairn", "Oban", "Perth", "Quorn", "Ripon", "Selby", "Troon", "Usk", "Wick",
)  # fmt: skip
CODE = (".py", ".js", ".ts", ".java", ".c", ".h", ".cpp", ".go", ".rs", ".rb", ".sh")
"""Files that a repository's prompt is made of."""
MARGIN, SHARE = 160, 0.96
"""Tokens left for chat template and answer, and the share of the others that is used, as estimates
may be too low."""


@dataclass(frozen=True)
class LongPrompt:
    """A prompt and what its answer must name.

    text: the prompt. answers: in any order.
    """

    text: str
    answers: tuple[str, ...]


def estimated_tokens(text: str) -> int:
    """About as many tokens as a byte-pair tokenizer makes of English text or code."""
    return len(_PIECE.findall(text))


def room(tokens: int) -> int:
    """Estimated tokens of a prompt of that length."""
    return int(SHARE * tokens) - MARGIN


def filler(coin: random.Random) -> str:
    """A sentence that says nothing that is asked for."""
    choices = (coin.choice(words) for words in (_SUBJECTS, _VERBS, _PLACES, _TIMES))
    return "The {} {} the {} {}.".format(*choices)


def hidden(facts: Sequence[str], question: str, tokens: int, coin: random.Random) -> str:
    """The facts, in their order, at random places of text of about so many tokens, then the
    question.
    """
    # 1. Sentences up to the length.
    left = room(tokens) - sum(map(estimated_tokens, (*facts, question)))
    sentences: list[str] = []
    while left > 0:
        sentences.append(filler(coin))
        left -= estimated_tokens(sentences[-1])
    # 2. Facts between them, the last place first.
    places = sorted(coin.randrange(len(sentences) + 1) for _ in facts)
    for place, fact in reversed(list(zip(places, facts))):
        sentences.insert(place, fact)
    return f"Read this text.\n\n{' '.join(sentences)}\n\n{question}"


def _number(coin: random.Random, digits: int = 6) -> str:
    return str(coin.randrange(10 ** (digits - 1), 10**digits))


def needle(tokens: int, coin: random.Random) -> LongPrompt:
    """One hidden fact alone."""
    city, code = coin.choice(_CITIES), _number(coin)
    question = f"What is the code of the {city} office? Answer with the number alone."
    return LongPrompt(
        hidden([f"The code of the {city} office is {code}."], question, tokens, coin), (code,)
    )


def needles(tokens: int, coin: random.Random) -> LongPrompt:
    """Four hidden facts, all of which are asked for."""
    cities = coin.sample(_CITIES, 4)
    codes = [_number(coin) for _ in cities]
    facts = [f"The code of the {city} office is {code}." for city, code in zip(cities, codes)]
    names = f"{', '.join(cities[:-1])} and {cities[-1]}"
    question = f"What are the codes of the offices in {names}? Answer with the four numbers alone."
    return LongPrompt(hidden(facts, question, tokens, coin), tuple(codes))


def passkey(tokens: int, coin: random.Random) -> LongPrompt:
    """A key among repeated lines."""
    key, line = _number(coin, 5), "The sky is grey. The road goes on. Nothing happens here."
    fact = f"The pass key is {key}. Keep it in mind: {key} is the pass key."
    question = "What is the pass key? Answer with the number alone."
    each = estimated_tokens(line + "\n")
    count = max(1, (room(tokens) - estimated_tokens(fact + question)) // each)
    lines = [line] * count
    lines.insert(coin.randrange(count + 1), fact)
    text = "\n".join(lines)
    return LongPrompt(f"A pass key is hidden in this text.\n\n{text}\n\n{question}", (key,))


def key_value(tokens: int, coin: random.Random) -> LongPrompt:
    """One value of a long table."""
    entry = "{}: {}".format
    count = max(2, room(tokens) // estimated_tokens(entry("12345678", "12345678") + "\n"))
    numbers = coin.sample(range(10**7, 10**8), 2 * count)
    pairs = list(zip(map(str, numbers[:count]), map(str, numbers[count:])))
    key, value = coin.choice(pairs)
    table = "\n".join(entry(*pair) for pair in pairs)
    question = f"What is the value of the key {key}? Answer with the number alone."
    return LongPrompt(f"Here is a table of keys and values.\n\n{table}\n\n{question}", (value,))


def variables(tokens: int, coin: random.Random) -> LongPrompt:
    """All names of one value, assigned from each other; another chain is not asked for."""
    names = coin.sample([f"{a}{b}{c}" for a in "BCDFG" for b in "KLMNP" for c in "RSTVZ"], 8)
    value, other = _number(coin, 5), _number(coin, 5)
    chains = names[:4], names[4:]
    facts: list[list[str]] = []
    for chain, start in zip(chains, (value, other)):
        sources = [start, *chain[:-1]]
        facts.append([f"Set {name} to {source}." for name, source in zip(chain, sources)])
    # Both chains keep their order.
    turns = coin.sample([0] * 4 + [1] * 4, 8)
    mixed = [facts[turn].pop(0) for turn in turns]
    question = f"Which names have the value {value} in the end? Answer with the four names alone."
    return LongPrompt(hidden(mixed, question, tokens, coin), tuple(chains[0]))


KINDS: dict[str, Callable[[int, random.Random], LongPrompt]] = {
    "needle": needle,
    "needles": needles,
    "passkey": passkey,
    "key_value": key_value,
    "variables": variables,
}


def generated(kind: str, tokens: int, count: int, seed: int) -> Iterator[LongPrompt]:
    """`count` prompts of a kind and length.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    for number in range(count):
        yield KINDS[kind](tokens, random.Random(f"{kind} {tokens} {number} {seed}"))


def repository(folder: Path, tokens: int, count: int, seed: int) -> Iterator[LongPrompt]:
    """Prompts of the code of a folder: some files, and the beginning of one more, whose next line
    is the answer.

    Raises:
        ValueError: no file of code with ten lines.
    """
    sources = {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(folder.rglob("*"))
        if path.suffix in CODE and path.is_file()
    }
    long = [name for name, text in sources.items() if text.count("\n") >= 10]
    if not long:
        raise ValueError(f"{folder} has no file of code ({', '.join(CODE)}) with ten lines")
    for number in range(count):
        coin = random.Random(f"repository {tokens} {number} {seed}")
        # 1. A line of some file, and the file up to it.
        name = coin.choice(long)
        lines = sources[name].splitlines()
        places = [i for i in range(5, len(lines)) if lines[i].strip()] or [len(lines) - 1]
        place = coin.choice(places)
        end = _section(name, "\n".join(lines[:place]))
        question = f"Continue {name}. Answer with its next line alone."
        # 2. Other files before it, as many as fit.
        left, parts = room(tokens) - estimated_tokens(end + question), []
        for other in coin.sample(sorted({*sources} - {name}), len(sources) - 1):
            words = sources[other].splitlines()
            while words and left < estimated_tokens(section := _section(other, "\n".join(words))):
                words = words[: len(words) // 2]
            if words:
                parts.append(section)
                left -= estimated_tokens(section)
        text = "\n\n".join([*parts, end])
        yield LongPrompt(f"{text}\n\n{question}", (lines[place].strip(),))


def _section(name: str, text: str) -> str:
    return f"File {name}:\n```\n{text}\n```"

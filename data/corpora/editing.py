"""An editing task: sentences with a few damaged words as prompts, the sentences as answers.

`python -m data.corpora.editing --output runs/editing` writes `train.jsonl` for training and
`heldout.jsonl` for evaluation, with identical bytes for one seed. Answers nearly copy their
prompts, as in grammar correction.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from configs.command_line.loading import config_parser, exit_with, parse
from data.reading.files import Tally
from data.reading.rows import load_conversations
from modules.runtime.files import whole_file

OWN_TEXT = (
    "*.md",
    "docs/*.md",
    *(f"{room}/**/*.py" for room in ("modules", "data", "eval", "train")),
)
"""Pages and docstrings of this repository."""
KINDS = ("insert", "delete", "swap", "misspell")
_SENTENCE = re.compile(r"[A-Z][^.!?:;*#|`\[\]()<>{}=_\"]*[.!?](?=\s|$)")
_PARAGRAPH = re.compile(r"\n\s*\n")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentences(texts: Iterable[str], shortest: int, longest: int) -> list[str]:
    """The different sentences of texts that have so many words, in order; none crosses an empty
    line.
    """
    parts = (part for text in texts for part in _PARAGRAPH.split(text))
    every = (" ".join(sentence.split()) for part in parts for sentence in _SENTENCE.findall(part))
    return list(
        dict.fromkeys(
            sentence for sentence in every if shortest <= len(sentence.split()) <= longest
        )
    )


def texts_of(source: str, files: Sequence[str]) -> Iterator[str]:
    """All turns of a data set's conversations, then the text of files.

    Raises:
        ValueError: a pattern that matches no file.
    """
    for conversation in load_conversations(source, None, "train", tally=Tally("conversation")):
        yield from (str(turn.get("content") or "") for turn in conversation.messages)
    for pattern in files:
        places = sorted(glob(pattern, recursive=True))
        if not places:
            raise ValueError(f"files {pattern!r} matches none: run it from the repository")
        yield from (Path(place).read_text(encoding="utf-8") for place in places)


def damaged(words: Sequence[str], edits: int, others: Sequence[str], chance: random.Random) -> str:
    """A sentence with so many edits: a word of `others` inserted, a word deleted, two neighbours
    swapped, or a letter of a word replaced.

    Args:
        words: of the sentence, at least two.
        edits: their number.
        others: words to insert.
        chance: where the kinds, places and words are drawn from.
    """
    changed = list(words)
    for _ in range(edits):
        kind = chance.choice(KINDS)
        place = chance.randrange(len(changed))
        if kind == "insert":
            changed.insert(place, chance.choice(others))
        elif kind == "delete" and len(changed) > 2:
            del changed[place]
        elif kind == "swap":
            first = min(place, len(changed) - 2)
            changed[first : first + 2] = reversed(changed[first : first + 2])
        else:
            changed[place] = _misspelt(changed[place], chance)
    return " ".join(changed)


def _misspelt(word: str, chance: random.Random) -> str:
    place = chance.randrange(len(word))
    return word[:place] + chance.choice(_LETTERS) + word[place + 1 :]


def pairs(
    clean: Sequence[str], count: int, most_edits: int, random_words: float, chance: random.Random
) -> list[dict[str, Any]]:
    """Rows of `count` prompts with 0 to `most_edits` edits.

    Args:
        clean: sentences, used in turn.
        count: rows.
        most_edits: of a prompt.
        random_words: share of rows whose answer has as many words at random instead.
        chance: of the edits and of such words.
    """
    every = sorted({word for sentence in clean for word in sentence.split()})
    others = [word for word in every if word.isalpha()]
    rows = []
    for number in range(count):
        words = clean[number % len(clean)].split()
        if chance.random() < random_words:
            words = chance.choices(every, k=len(words))
        prompt = damaged(words, chance.randint(0, most_edits), others, chance)
        rows.append({"category": "editing", "prompt": prompt, "response": " ".join(words)})
    return rows


def build(
    output: str,
    source: str = "embedded",
    files: list[str] | None = None,
    train: int = 20000,
    heldout: int = 200,
    edits: int = 2,
    shortest: int = 5,
    longest: int = 16,
    random_words: float = 0.5,
    seed: int = 0,
) -> None:
    """Write pairs for training and for evaluation, of different sentences.

    Args:
        output: folder to write.
        source: where sentences are taken from: embedded, a file or pattern of files, or a Hub data
            set.
        files: further texts, as patterns; by default this repository's pages and docstrings.
        train: pairs for training.
        heldout: pairs for evaluation, each of a sentence of its own.
        edits: of a prompt at most.
        shortest, longest: words of a sentence.
        random_words: share of the pairs for training whose answers are words at random, from which
            copying is learnt sooner than from sentences, which can be remembered.
        seed: of the order of sentences and of the edits.

    Raises:
        ValueError: no sentences for training, sentences of fewer than two words, or a share that is
            none.
    """
    if shortest < 2:
        raise ValueError(f"shortest must be at least 2 words, got {shortest}")
    if not 0 <= random_words <= 1:
        raise ValueError(f"random_words must lie in [0, 1], got {random_words}")
    # 1. Sentences in a random order; those for evaluation come first.
    texts = texts_of(source, OWN_TEXT if files is None else files)
    clean, chance = sentences(texts, shortest, longest), random.Random(seed)
    chance.shuffle(clean)
    if len(clean) <= heldout:
        raise ValueError(
            f"{source!r} has {len(clean)} sentences of {shortest} to {longest} words, heldout is "
            f"{heldout}: lower it"
        )
    # 2. Damage and write them.
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some, count, share in (
        ("heldout", clean[:heldout], heldout, 0.0),
        ("train", clean[heldout:], train, random_words),
    ):
        rows = pairs(some, count, edits, share, chance)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with whole_file(folder / f"{name}.jsonl") as partial:
            partial.write_text("".join(lines), encoding="utf-8")
    print(f"{train} and {heldout} pairs of {len(clean)} sentences: {folder}")


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and build."""
    parser = config_parser("python -m data.corpora.editing", "Generate an editing task.")
    parser.add_function_arguments(build, fail_untyped=True)
    settings = vars(parse(parser, arguments))
    settings.pop("config", None)
    build(**{key: value for key, value in settings.items() if not key.startswith("__")})
    return 0


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)


if __name__ == "__main__":
    main()

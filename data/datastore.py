"""`python -m data.datastore`: a corpus with a suffix array, for retrieval drafters (rest, aded,
rasd).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.command_line.loading import config_parser, exit_with, parse
from data.conversations import tokenize_all
from data.reading.files import Tally
from data.reading.rows import load_conversations
from modules.drafters.retrieval.suffix_array import Datastore
from modules.target.loading import load_target


def build(
    output: str,
    source: str = "embedded",
    target: str = "smollm2-135m",
    split: str = "train",
    limit: int | None = None,
    max_length: int = 2048,
    chat_template: dict[str, Any] | None = None,
) -> None:
    """Tokenise a data set with the target's chat template and sort its suffixes.

    Args:
        output: folder to write.
        source: embedded, a file or pattern of files (.jsonl, .json, .parquet), or a Hub data set.
        target: Hub id, folder, .gguf file or smollm2-135m, whose tokenizer is used.
        split: of a Hub data set.
        limit: conversations read at most.
        max_length: tokens of one conversation at most.
        chat_template: arguments of the target's chat template.

    Raises:
        ValueError: the data set is empty.
    """
    # 1. Only the tokenizer is used.
    loaded = load_target(target, device="cpu", chat_template=chat_template)
    tally = Tally("conversation")
    documents = tokenize_all(
        load_conversations(source, limit, split, tally=tally),
        loaded.tokenizer,
        max_length,
        None,
        loaded.eos_ids,
        loaded.shape.vocab_size,
        tally,
    )
    # 2. Sort the suffixes, and save.
    store = Datastore.build(
        [document.input_ids.tolist() for document in documents], loaded.shape.vocab_size
    )
    store.save(Path(output), source)
    print(f"{len(documents)} documents, {len(store.tokens_M)} tokens: {output}")


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and build."""
    parser = config_parser(
        "python -m data.datastore", "Index a data set for drafters that retrieve."
    )
    parser.add_function_arguments(build, fail_untyped=True)
    built = vars(parse(parser, arguments))
    built.pop("config", None)
    build(**{key: value for key, value in built.items() if not key.startswith("__")})
    return 0


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)


if __name__ == "__main__":
    main()

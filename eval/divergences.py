"""`python -m eval.divergences`: label where a drafter leaves its target, as training data for a
judge.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from checkpoints.pretrained import find_folder, read_config
from configs.command_line.loading import called, exit_with
from data.generation.answering import Journal, Key, chats_of, prompt_rows, prompts_digest
from data.labelled.mining import mine
from data.reading.files import Tally
from eval.methods.rows import load_drafter
from eval.methods.templates import chat_arguments
from modules.decoding.translation import in_target_ids
from modules.runtime.files import whole_file
from modules.target.kernels.cpu_kernels import use_narrow_linears
from modules.target.loading import AUTO, check_room, load_target
from modules.target.target import Target


def _loaded(name: str, tokens: int, dtype: str, device: str | None, drafter: str) -> Target:
    """The target, once its context is known to have room for the answers."""
    check_room(name, tokens)
    return load_target(name, dtype, device, chat_arguments(None, [drafter]))


def mine_file(
    drafter: str,
    prompts: str,
    output: str,
    target: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    per_prompt: int = 8,
    dtype: str = AUTO,
    device: str | None = None,
) -> None:
    """Write a `.jsonl` file that `data.labelled.labelled.LabelledData` reads; after an interruption
    the same command continues.

    Args:
        drafter: run folder, drafter folder or Hub id.
        prompts: JSONL file of rows with `prompt`, `question` or `messages` that end in a number as
            the answer.
        output: the `.jsonl` to write.
        target: Hub id, folder or .gguf file; by default what the drafter was trained for.
        limit: number of prompts, from the beginning of the file.
        max_new_tokens: of each answer; truncated answers give no label.
        per_prompt: mismatches of each answer whose drafted tokens are labelled, from its beginning;
            each costs the target an answer per drafted token.
        dtype: of the target: float32, bfloat16, float16 or float64; auto is bfloat16 on a GPU that
            multiplies it and float32 elsewhere.
        device: a torch device; by default the GPU if there is one.
    """
    place = Path(output)
    if place.suffix != ".jsonl" or place.exists():
        raise ValueError(f"output {output!r} must be a new file that ends in .jsonl")
    tally = Tally("prompt")
    questions = [chat.questions[0] for chat in chats_of(prompt_rows(prompts, limit, tally), tally)]
    tally.log()
    folder = find_folder(drafter)
    named = target or read_config(folder)["target"]["name"]
    loaded = _loaded(named, max_new_tokens, dtype, device, drafter)
    component = load_drafter(drafter, loaded)
    served = component.adapt(loaded)
    if loaded.device.type == "cpu":
        use_narrow_linears(component)
    translated = in_target_ids(component, served)
    # Mine prompt by prompt; finished prompts are in the journal.
    place.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(
        place.with_name(place.name + ".journal"),
        {
            "target": loaded.fingerprint(),
            "drafter": str(folder),
            "prompts": prompts_digest([{"messages": messages} for messages in questions]),
            **{"max_new_tokens": max_new_tokens, "per_prompt": per_prompt},
        },
        needs="rows",
    )
    for index, messages in enumerate(track(questions, "mining", disable=not sys.stderr.isatty())):
        if (index, 0, 0) not in journal.answers:
            rows = list(mine(served, translated, messages, max_new_tokens, per_prompt))
            journal.append([{"index": index, "number": 0, "rows": rows}])
    write_mined([journal.answers[Key(i, 0, 0)]["rows"] for i in range(len(questions))], place)
    journal.remove()


def write_mined(mined: Sequence[list[dict[str, Any]]], place: Path) -> None:
    """Write the rows of all prompts at once, and print their counts."""
    rows = [row for prompt_rows in mined for row in prompt_rows]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with whole_file(place) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    wrong, silent = (
        sum(1 - row["spans"][0][2] for row in rows),
        sum(not prompt_rows for prompt_rows in mined),
    )
    print(
        f"{len(rows)} drafted tokens, {wrong} of them change the answer: {place} ({silent} of "
        f"{len(mined)} prompts gave none: nothing was rejected, or an answer did not end or holds "
        "no number)"
    )


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and mine; returns the exit status."""
    return called(
        mine_file, arguments, "eval.divergences", "Label where a drafter leaves its target."
    )


if __name__ == "__main__":
    exit_with(command)

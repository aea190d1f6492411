"""`python -m data.regenerate`: answer prompts with the target, so that drafters learn the target's
own distribution. Where a server runs the target, use `python -m data.endpoint` instead.

Of the target's `generation_config` only the end tokens are applied
(`modules.target.generation_config`): greedy answers equal those of the decoder.

Every finished batch is written to a journal beside the output, which an interrupted run continues.
The output is written atomically at the end; prompts that cannot be answered are counted by reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.command_line.loading import accept_recipes, config_parser, exit_with, parse
from configs.command_line.progress import progress_of
from data.conversations import check_ids, prompt_ids
from data.generation.answering import (
    Chat,
    Journal,
    Key,
    chats_of,
    making,
    open_questions,
    prompt_rows,
    prompts_digest,
    summary,
    writable,
    write_answers,
)
from data.reading.files import Row, Skipped, Tally, read_jsonl
from modules.contracts.sampling import Sampling
from modules.target.generation_config import stock_generate
from modules.target.loading import AUTO, check_room, load_target
from modules.target.tokenizers.chat_template import arguments_of

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass(frozen=True)
class Generation:
    """Settings of the answers.

    Args:
        max_new_tokens: answers are truncated there (and then marked as not finished).
        temperatures: answer j of prompt i is sampled at `temperatures[(i + j) % n]`; 0 is greedy.
        answers: answers per prompt, of which at most one may be greedy.
        top_p: nucleus of sampled answers.
        batch_size: prompts generated at a time.
        seed: of sampling.
    """

    max_new_tokens: int = 192
    temperatures: tuple[float, ...] = (0.0, 0.8)
    answers: int = 1
    top_p: float = 1.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot generate."""
        # Each value alone, then what would repeat answers.
        for name in ("max_new_tokens", "answers", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or above, got {getattr(self, name)}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"temperatures must be a list of 0 or above, got {list(self.temperatures)}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        greedy = [
            sum(self.temperature(index, number) == 0 for number in range(self.answers))
            for index in range(len(self.temperatures))
        ]
        if max(greedy) > 1:
            raise ValueError(
                f"answers is {self.answers}, but a greedy answer would repeat with temperatures "
                f"{list(self.temperatures)}: give fewer answers, or temperature 0 less often"
            )

    def temperature(self, index: int, number: int) -> float:
        """The temperature of answer `number` to prompt `index`."""
        return self.temperatures[(index + number) % len(self.temperatures)]

    def seed_of(self, key: Key) -> int:
        """The seed of a sampled answer."""
        return self.seed + 1_000_003 * key.index + key.number + 7919 * key.turn

    def settings(self) -> dict[str, Any]:
        """The settings that determine the answers."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperatures": list(self.temperatures),
            "answers": self.answers,
            "top_p": self.top_p,
            "seed": self.seed,
        }


class Job(NamedTuple):
    """One answer to generate, from the prompt's `ids`."""

    key: Key
    temperature: float
    ids: list[int]


def regenerate(
    target: Target,
    prompts: Sequence[Row],
    output: str | Path,
    generation: Generation = Generation(),
    progress: bool = True,
    tally: Tally | None = None,
) -> Path:
    """Answer `prompts` and write one JSONL row per answer.

    A row has its prompt's keys (`category`, `prompt`, …) and `response`, `response_ids`,
    `temperature` and `finished`. A chat's questions are answered one after the other, each after
    the new answers to the earlier ones, and the chat is stored in `messages`; it ends early where
    an answer is truncated, names a function that the row offers (`tools`), or fills the context.
    Tool calls that have their results are kept, with `weight` 0.

    Args:
        target: the model that answers.
        prompts: rows of any shape that `data.reading.rows` reads; their answers are not used.
        output: `.jsonl` or `.jsonl.gz`.
        generation: settings of the answers.
        progress: whether a bar is shown.
        tally: counts skipped prompts: of an unknown shape, or longer than the context.

    Raises:
        ValueError: the output exists, no prompt can be answered, or the journal beside the output
            belongs to other settings.
    """
    tally = Tally("prompt") if tally is None else tally
    with making(Path(output)) as place:
        # 1. Continue a journal with the same settings.
        chats = chats_of(prompts, tally, offered=True)
        journal = Journal(
            place.with_name(place.name + ".journal"), _settings(target, prompts, generation)
        )
        total = generation.answers * sum(len(chat.questions) for chat in chats)
        begun = len(journal.answers)
        with progress_of(str(place), "answers", begun, total, progress) as advance:
            # 2. Turn by turn, in batches of one temperature and similar length.
            for turn in range(max(len(chat.questions) for chat in chats)):
                for batch in _batches(
                    list(_jobs(target, chats, turn, journal, generation, tally)),
                    generation.batch_size,
                ):
                    journal.append(
                        [
                            _answer(job, ids, target)
                            for job, ids in zip(batch, _generate(target, batch, generation))
                        ]
                    )
                    advance(len(batch))
                if not journal.answers:
                    raise ValueError(f"no prompt can be answered: {tally.reasons()}")
        # 3. Write all rows, then remove the journal.
        write_answers(place, chats, generation.answers, journal, tally)
    return place


# -- generating ------------------------------------------------------------------------------------


def _jobs(
    target: Target,
    chats: Sequence[Chat],
    turn: int,
    journal: Journal,
    generation: Generation,
    tally: Tally,
) -> Iterator[Job]:
    """Jobs for question number `turn` of each chat; a prompt that does not fit is counted once."""
    # The answer needs room in the context.
    room = target.max_positions - generation.max_new_tokens
    for chat, key, messages in open_questions(chats, turn, generation.answers, journal):
        try:
            ids = prompt_ids(messages, target.tokenizer, chat.tools, chat.template)
            check_ids(ids, target.tokenizer, target.shape.vocab_size)
            if len(ids) > room:
                raise Skipped(
                    f"longer than {room} tokens, the context of {target.name!r} less "
                    f"max_new_tokens {generation.max_new_tokens}"
                )
        except Skipped as reason:
            if not turn and not key.number:
                tally.skip(str(reason), chat.row.place)
            continue
        yield Job(key, generation.temperature(key.index, key.number), ids)


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Batches of jobs with one temperature and similar lengths."""
    for temperature in sorted({job.temperature for job in jobs}):
        same = sorted(
            (job for job in jobs if job.temperature == temperature), key=lambda job: len(job.ids)
        )
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _generate(target: Target, jobs: Sequence[Job], generation: Generation) -> list[list[int]]:
    """New ids per job, up to the first end-of-turn token."""
    sampling = Sampling(
        jobs[0].temperature, top_p=generation.top_p, seed=generation.seed_of(jobs[0].key)
    )
    return stock_generate(
        target.model, [job.ids for job in jobs], sampling, generation.max_new_tokens, target.eos_ids
    )


def _answer(job: Job, ids: list[int], target: Target) -> dict[str, Any]:
    text = target.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return {
        **job.key._asdict(),
        "response": text,
        "response_ids": ids,
        "temperature": job.temperature,
        "finished": ids[-1] in target.eos_ids,
    }


def _settings(target: Target, prompts: Sequence[Row], generation: Generation) -> dict[str, Any]:
    return {
        "target": target.fingerprint(),
        "stop_ids": sorted(target.eos_ids),
        "chat_template": arguments_of(target.tokenizer) or None,
        **generation.settings(),
        "prompts": prompts_digest([row.content for row in prompts]),
    }


# -- command line ----------------------------------------------------------------------------------


def answer_file(
    prompts: str,
    output: str,
    target: str = "smollm2-135m",
    dtype: str = AUTO,
    device: str | None = None,
    limit: int | None = None,
    generation: Generation = Generation(),
    chat_template: dict[str, Any] | None = None,
) -> None:
    """Let a target answer prompts.

    Args:
        prompts: file of prompts or chats (.jsonl, .json, .parquet), or a pattern of such.
        output: the `.jsonl` or `.jsonl.gz` to write.
        target: Hub id, folder, .gguf file or smollm2-135m.
        dtype: of the target: float32, bfloat16, float16 or float64; auto is bfloat16 on a GPU that
            multiplies it and float32 elsewhere.
        device: to generate on; null is this process's GPU, or the CPU.
        limit: number of prompts, from the beginning.
        generation: settings of the answers.
        chat_template: arguments of the target's chat template, as in the recipe that trains on the
            answers.
    """
    tally = Tally("prompt")
    rows = prompt_rows(prompts, limit, tally)
    writable(Path(output))
    check_room(target, generation.max_new_tokens)
    regenerate(
        load_target(target, dtype, device, chat_template), rows, output, generation, tally=tally
    )
    print(summary(output, sum(1 for _ in read_jsonl(Path(output))), tally))


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and generate the answers; returns the exit status."""
    parser = config_parser(
        "python -m data.regenerate", "Let a target answer prompts: what drafters are to learn."
    )
    parser.add_function_arguments(answer_file, fail_untyped=True)
    accept_recipes(parser)
    built = vars(parser.instantiate(parse(parser, arguments)))
    answer_file(**{name: built[name] for name in inspect.signature(answer_file).parameters})
    return 0


if __name__ == "__main__":
    exit_with(command)

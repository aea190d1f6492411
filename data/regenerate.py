"""`python -m data.regenerate`: the target answers the prompts itself, so that drafters learn what it will really say.
Where a server runs the target, `python -m data.endpoint` asks that instead.

Nothing of the target's `generation_config` is applied but its end tokens
(`modules.core.generation`): greedy answers are what the decoder says.

Every finished batch goes to a journal beside the output, and an interrupted run skips what is there. The output
appears at the end, whole.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.configfiles import config_parser, parse, run
from data.conversations import prompt_ids
from data.files import read_jsonl
from data.rows import Message
from modules.core.chat import arguments_of
from modules.core.drafter import Sampling
from modules.core.generation import stock_generate
from modules.core.loading import load_target

if TYPE_CHECKING:
    from modules.core.target import Target


@dataclass(frozen=True)
class Generation:
    """How answers are made.

    Args:
        max_new_tokens: an answer is cut there (and then marked as not finished).
        temperatures: answer j of prompt i is sampled at `temperatures[(i + j) % n]`; 0 is greedy.
        answers: answers per prompt; no more than there are temperatures, if one of them is 0.
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
        for name in ("max_new_tokens", "answers", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or above, got {getattr(self, name)}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures must be a list of 0 or above, got {list(self.temperatures)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if 0 in self.temperatures and self.answers > len(self.temperatures):
            raise ValueError(f"answers is {self.answers}, but a greedy answer would repeat: give at most "
                             f"{len(self.temperatures)}, or no temperature 0")

    def temperature(self, index: int, number: int) -> float:
        """Of answer `number` to prompt `index`."""
        return self.temperatures[(index + number) % len(self.temperatures)]

    def settings(self) -> dict[str, Any]:
        """What decides the answers."""
        return {"max_new_tokens": self.max_new_tokens, "temperatures": list(self.temperatures),
                "answers": self.answers, "top_p": self.top_p, "seed": self.seed}


class Job(NamedTuple):
    """One answer to make: prompt `index`, answer `number`, from `ids`."""

    index: int
    number: int
    temperature: float
    ids: list[int]


def regenerate(target: Target, prompts: Sequence[dict[str, Any]], output: str | Path,
               generation: Generation = Generation(), progress: bool = True) -> Path:
    """Answer `prompts` and write one JSONL row per answer.

    A row keeps its prompt's keys (`category`, `prompt`, …) and adds `response`, `response_ids`, `temperature` and
    `finished`; for a prompt given as `messages` the answer is appended to them too.

    Args:
        target: answers, and is taught by what it says.
        prompts: rows with `prompt`, `question` or `messages`.
        output: `.jsonl` or `.jsonl.gz`.
        generation: how.

    Raises:
        ValueError: the output exists, a prompt is of an unknown shape or longer than the context, or the journal beside
            the output belongs to other settings.
    """
    output = writable(Path(output))
    journal = Journal(output.with_name(output.name + ".journal"), _settings(target, prompts, generation))
    jobs = _jobs(target, prompts, generation)
    pending = [job for job in jobs if (job.index, job.number) not in journal.answers]
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=len(jobs), completed=len(jobs) - len(pending))
        for batch in _batches(pending, generation.batch_size):
            journal.append([_answer(job, ids, target) for job, ids in zip(batch, _generate(target, batch, generation))])
            bar.advance(task, len(batch))
    write_rows(output, [answered_row(prompts[job.index], journal.answers[job.index, job.number]) for job in jobs])
    journal.path.unlink()
    return output


# -- generating -------------------------------------------------------------------------------------------------


def _jobs(target: Target, prompts: Sequence[dict[str, Any]], generation: Generation) -> list[Job]:
    room = target.max_positions - generation.max_new_tokens
    jobs = []
    for index, row in enumerate(prompts):
        ids = prompt_ids(messages_of(row, index), target.tokenizer)
        if len(ids) > room:
            raise ValueError(f"prompt {index + 1} has {len(ids)} tokens; the context of {target.name!r} less "
                             f"max_new_tokens {generation.max_new_tokens} holds {room}: shorten it")
        for number in range(generation.answers):
            jobs.append(Job(index, number, generation.temperature(index, number), ids))
    return jobs


def messages_of(row: dict[str, Any], index: int) -> list[Message]:
    """The chat that a prompt row opens."""
    if isinstance(row.get("messages"), list):
        return row["messages"]
    asked = next((row[key] for key in ("prompt", "question") if isinstance(row.get(key), str)), None)
    if asked is None:
        raise ValueError(f"prompt {index + 1} has keys {', '.join(row) or '(none)'}: expected `prompt`, `question` or "
                         "`messages`")
    return [{"role": "user", "content": asked}]


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs of one temperature and similar length together."""
    for temperature in sorted({job.temperature for job in jobs}):
        same = sorted((job for job in jobs if job.temperature == temperature), key=lambda job: len(job.ids))
        for start in range(0, len(same), size):
            yield same[start:start + size]


def _generate(target: Target, jobs: Sequence[Job], generation: Generation) -> list[list[int]]:
    """New ids per job, cut behind the first end-of-turn token."""
    sampling = Sampling(jobs[0].temperature, top_p=generation.top_p,
                        seed=generation.seed + 1_000_003 * jobs[0].index + jobs[0].number)
    return stock_generate(target.model, [job.ids for job in jobs], sampling,
                          generation.max_new_tokens, target.eos_ids)


def _answer(job: Job, ids: list[int], target: Target) -> dict[str, Any]:
    text = target.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"index": job.index, "number": job.number, "response": text, "response_ids": ids,
            "temperature": job.temperature, "finished": ids[-1] in target.eos_ids}


def answered_row(prompt: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """A prompt's row with its answer."""
    made = {key: answer[key] for key in ("response", "response_ids", "temperature", "finished") if key in answer}
    if "messages" in prompt:
        made["messages"] = [*prompt["messages"], {"role": "assistant", "content": answer["response"]}]
    return {**prompt, **made}


# -- files ------------------------------------------------------------------------------------------------------


class Journal:
    """Answers made so far, one line each behind a line of settings; a line cut short by a kill is dropped.

    Raises:
        ValueError: it was begun with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.answers: dict[tuple[int, int], dict[str, Any]] = {}
        if not path.exists():
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        whole = path.read_text(encoding="utf-8")
        lines = whole[:whole.rfind("\n") + 1].splitlines()
        begun = json.loads(lines[0]) if lines else settings
        for key, value in settings.items():
            if begun.get(key) != value:
                raise ValueError(f"journal {str(path)!r} was begun with {key} {begun.get(key)}, not {value}: "
                                 "restore it, or delete the journal")
        self._replace([json.dumps(settings), *lines[1:]])
        for line in lines[1:]:
            self._remember(json.loads(line))

    def append(self, answers: Sequence[dict[str, Any]]) -> None:
        """Write a batch of answers through to the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
            file.flush()
            os.fsync(file.fileno())
        for answer in answers:
            self._remember(answer)

    def _replace(self, lines: Sequence[str]) -> None:
        scratch = self.path.with_name(self.path.name + ".partial")
        scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(scratch, self.path)

    def _remember(self, answer: dict[str, Any]) -> None:
        self.answers[answer["index"], answer["number"]] = answer


def _settings(target: Target, prompts: Sequence[dict[str, Any]], generation: Generation) -> dict[str, Any]:
    return {"target": target.fingerprint(), "stop_ids": sorted(target.eos_ids),
            "chat_template": arguments_of(target.tokenizer), "prompts": prompts_digest(prompts),
            **generation.settings()}


def prompts_digest(prompts: Sequence[dict[str, Any]]) -> str:
    """Hash of all prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def writable(output: Path) -> Path:
    """A path that answers may be written to; ValueError if not."""
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"output {str(output)!r} must end in .jsonl or .jsonl.gz")
    if output.exists():
        raise ValueError(f"output {str(output)!r} exists already: delete it or give another")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def write_rows(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows at once; compressed files are the same bytes for the same rows."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    scratch = output.with_name(output.name + ".partial")
    scratch.write_bytes(gzip.compress(content, 9, mtime=0) if output.suffix == ".gz" else content)
    os.replace(scratch, output)


# -- command line -----------------------------------------------------------------------------------------------

_OF_TRAINING = ("seed", "objective", "drafter", "data", "optimizer", "trainer", "probe", "checkpoint", "publish")
"""Sections of a recipe that do not matter here: of `--config clover.yaml`, `target` and `dtype` do."""


def answer_file(prompts: str, output: str, target: str = "smollm2-135m", dtype: str = "float32", device: str = "cpu",
                limit: int | None = None, generation: Generation = Generation(),
                chat_template: dict[str, Any] | None = None) -> None:
    """Let a target answer prompts.

    Args:
        prompts: JSONL file of rows with `prompt`, `question` or `messages`.
        output: the `.jsonl` or `.jsonl.gz` to write.
        target: Hub id, folder, .gguf file or smollm2-135m.
        dtype: of the target: float32, bfloat16, float16 or float64.
        device: to generate on.
        limit: answer only the first so many prompts.
        generation: how answers are made.
        chat_template: arguments of the target's chat template, as in the recipe that trains on the answers.
    """
    rows = prompt_rows(prompts, limit)
    writable(Path(output))
    regenerate(load_target(target, dtype, device, chat_template), rows, output, generation)
    print(f"{len(rows) * generation.answers} answers: {output}")


def prompt_rows(prompts: str, limit: int | None) -> list[dict[str, Any]]:
    """The first rows of a file of prompts; ValueError when there are none."""
    if not Path(prompts).is_file():
        raise ValueError(f"prompts {prompts!r} does not exist: give a .jsonl or .jsonl.gz file")
    rows = list(read_jsonl(Path(prompts)))[:limit]
    if not rows:
        raise ValueError(f"prompts {prompts!r} is empty: give at least one")
    return rows


def command(arguments: Sequence[str]) -> int:
    """Parse and answer."""
    parser = config_parser("python -m data.regenerate", "Let a target answer prompts: what drafters are to learn.")
    parser.add_function_arguments(answer_file, fail_untyped=True)
    for section in _OF_TRAINING:
        parser.add_argument(f"--{section}", type=Any, help=argparse.SUPPRESS)
    built = vars(parser.instantiate(parse(parser, arguments)))
    answer_file(**{name: built[name] for name in inspect.signature(answer_file).parameters})
    return 0


if __name__ == "__main__":
    sys.exit(run(command, sys.argv[1:]))

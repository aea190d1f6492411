"""`python eval.py`: the command line and the YAML have the keys of `eval.evaluation.Evaluation`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from checkpoints.checks import strange_values
from checkpoints.reports import load_report
from configs.command_line.loading import exit_with, parse
from configs.command_line.outputs import write_whole
from configs.command_line.progress import quieten
from eval.evaluation import Evaluation, evaluate
from eval.methods.rows import Method
from eval.report.compare import comparison_lines, comparison_table
from eval.report.html import page
from eval.report.markdown import failures
from eval.report.output_folder import PAGE
from eval.serving.settings import Serving

NOT_LOSSLESS = 1
"""Exit status when a method that claims to be lossless gave other tokens than the baseline."""
_LISTS = ("drafters", "prompts")
_USAGE = """\
python eval.py --config eval/smoke.yaml --drafters runs/clover [--KEY VALUE ...]
       python eval.py --compare A.json B.json
       python eval.py --render report.json"""


def make_parser() -> ArgumentParser:
    """The parser of `python eval.py`: the keys of `Evaluation`, and flags of this command."""
    parser = ArgumentParser(
        prog="python eval.py",
        usage=_USAGE,
        exit_on_error=False,
        description=(
            "Measure drafters against plain decoding, interleaved in one process. Exit status: 0, "
            "1 when a lossless method was not (with --compare: in the second report), 2 for a "
            "mistake in what was asked or a disk that is full, 130 after Ctrl-C, 143 after "
            "SIGTERM. --allow_package NAME lets class_path name classes of that package too."
        ),
    )
    parser.add_argument(
        "--config", action="config", help="a path, or a file under configs/; several merge"
    )
    parser.add_argument(
        "--output", type=str | None, help="folder of the report; by default runs/eval/CONFIG"
    )
    # Flags of the command itself.
    parser.add_argument("--resume", action="store_true", help="continue an interrupted evaluation")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier evaluation in the same output"
    )
    parser.add_argument(
        "--compare", nargs=2, type=str, metavar=("A", "B"), help="compare two reports instead"
    )
    parser.add_argument(
        "--render",
        type=str,
        metavar="REPORT",
        help=(
            "write the page of an earlier report beside it; an answer, which only the evaluation "
            "itself has, is left out"
        ),
    )
    for name in _LISTS:
        field = next(field for field in fields(Evaluation) if field.name == name)
        default = cast(Any, field.default_factory)()
        parser.add_argument(
            f"--{name}", nargs="+", type=str, default=default, help=_described(name)
        )
    parser.add_class_arguments(Evaluation, skip=set(_LISTS), fail_untyped=True)
    # Lists may be given as several words, so they are added separately.
    return parser


def _described(name: str) -> str:
    lines = inspect.getdoc(Evaluation) or ""
    return next(
        line.split(": ", 1)[1]
        for line in lines.splitlines()
        if line.strip().startswith(f"{name}: ")
    )


def read(settings: Namespace) -> Evaluation:
    """The evaluation described by a parsed command line."""
    values = settings.as_dict()
    keys = {field.name: values[field.name] for field in fields(Evaluation)}
    methods = [Method(**method) for method in keys["methods"]]
    return Evaluation(**{**keys, "methods": methods, "serving": Serving(**keys["serving"])})


def command(arguments: Sequence[str]) -> int:
    """Evaluate or compare; returns the exit status.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    # Commands on finished reports need no target.
    settings = parse(make_parser(), arguments)
    quieten()
    if settings.compare:
        return compare(*settings.compare)
    # By default the output is named after the last config.
    if settings.render:
        return render(settings.render)
    configs = [str(path) for path in settings.config or []]
    name = Path(configs[-1]).stem if configs else "evaluation"
    output = Path(settings.output or Path("runs/eval") / name)
    report = evaluate(read(settings), output, settings.resume, overwrite=settings.overwrite)
    return NOT_LOSSLESS if failures(report) else 0


def compare(left: str, right: str) -> int:
    """Print the changes between two reports; the exit status is the second report's."""
    before, after = load_report(left), load_report(right)
    console = Console()
    console.print(comparison_table(before, after, console.width))
    for line in comparison_lines(before, after):
        console.print(line, highlight=False, markup=False)
    return NOT_LOSSLESS if failures(after) else 0


def render(path: str) -> int:
    """Write `report.html` beside a `report.json`, given as a file or as its folder.

    Raises:
        ValueError: no report of this schema, or one without figures that the page shows.
    """
    report = load_report(path)
    place = (Path(path) if Path(path).is_dir() else Path(path).parent) / PAGE
    wrong = f"report {path!r} does not hold what its page shows, measure it again"
    with strange_values(wrong, refusals=False):
        text = page(report, None)
    write_whole({place: text})
    Console().print(f"report: {place}", highlight=False, markup=False, soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python eval.py` and exit with its status."""
    exit_with(command, arguments)


if __name__ == "__main__":
    main()

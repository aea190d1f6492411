"""`python -m train.learning_curve --config judge.yaml --sizes "[1000, 4000, 16000]"`: results
over the amount of training data.

The recipe is trained once per size, on the first tokens of its training data
(`data.max_training_tokens`); the held-out data are the same for all sizes. Give
`trainer.max_steps` for the same number of steps at every size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes

from checkpoints.pretrained import PROVENANCE
from configs.command_line.loading import exit_with, parse
from configs.command_line.outputs import claimed, write_whole
from eval.report import plots
from modules.runtime.html_page import html_page
from modules.target.loading import load_target
from modules.target.target import Target
from train.cli import make_parser, quieten, recipe_of, recipe_settings
from train.run import Place, claim, train
from train.settings import training_device

FIGURES, PAGE = "learning_curve.json", "learning_curve.html"


@dataclass(frozen=True)
class Point:
    """One training: its number of training tokens, and all figures of the run by name."""

    tokens: int
    measured: Mapping[str, float]


def curve(
    parser: ArgumentParser, config: Namespace, output: Path, sizes: Sequence[int], target: Target
) -> list[Point]:
    """Train the recipe on every size in turn, each into a folder of `output` named after it."""
    points = []
    # Sizes ascend; the target is loaded once for all of them.
    for size in sizes:
        recipe = recipe_of(parser, config)
        recipe.data.max_training_tokens = size
        place = output / str(size)
        settings = recipe_settings(parser, config)
        with claim(place, None, config.overwrite):
            folder = train(recipe, Place(place, settings=settings), target).folder
        measured = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["measured"]
        points.append(Point(recipe.data.response_tokens, measured))
    return points


def picture(points: Sequence[Point], figure: str) -> str:
    """One figure over the number of training tokens, as an SVG element."""

    def draw(axes: Axes) -> None:
        axes.plot(
            [point.tokens for point in points],
            [point.measured[figure] for point in points],
            marker="o",
            markersize=4,
            color=plots.COLOURS[0],
        )
        axes.set_xscale("log")
        axes.set_xlabel("training tokens")
        axes.set_ylabel(figure)
        axes.grid(color="#e3e7ee")

    return plots.svg(draw, 5.6, 3.6, "learning curve")


def lines(points: Sequence[Point], figure: str) -> list[str]:
    """A table of the sizes and the figure."""
    return [
        f"{'tokens':>10}  {figure}",
        *(f"{point.tokens:>10}  {point.measured[figure]:.4f}" for point in points),
    ]


def page(points: Sequence[Point], figure: str, title: str) -> str:
    """A self-contained HTML page: the picture and the table."""
    table = escape("\n".join(lines(points, figure)))
    return html_page(title, [picture(points, figure), f"<pre>{table}</pre>"])


def check(sizes: Sequence[int]) -> None:
    """Raise ValueError unless the sizes are positive and ascending."""
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"--sizes must be ascending numbers of tokens, got {list(sizes)}: for example [1000, "
            "4000]"
        )


def make_curve_parser() -> ArgumentParser:
    """A parser with the keys of `python train.py`, `--sizes` and `--figure`."""
    parser = make_parser()
    parser.add_argument(
        "--sizes", type=list[int], required=True, help="training tokens of each run, ascending"
    )
    parser.add_argument(
        "--figure", type=str, default="held_out/auc", help="what is drawn, by its name"
    )
    return parser


def command(arguments: Sequence[str]) -> int:
    """Train every size, draw the curve, and print the table."""
    parser = make_curve_parser()
    config = parse(parser, arguments)
    check(config.sizes)
    output = Path(config.output or "runs/learning_curve")
    quieten()
    with claimed(output) if rank_zero_only.rank == 0 else nullcontext():
        finish(parser, config, output)
    return 0


def finish(parser: ArgumentParser, config: Namespace, output: Path) -> None:
    """Train every size, and write the figures and the page."""
    place = training_device(config.trainer.accelerator)
    target = load_target(config.target, config.dtype, place, config.chat_template)
    points = curve(parser, config, output, config.sizes, target)
    if config.figure not in points[0].measured:
        raise ValueError(
            f"--figure {config.figure!r} was not measured: use one of "
            f"{', '.join(points[0].measured)}"
        )
    # Figures of every size as JSON, and the chosen one as a page.
    values = [{"tokens": point.tokens, **point.measured} for point in points]
    write_whole(
        {
            output / FIGURES: json.dumps(values, indent=1) + "\n",
            output / PAGE: page(points, config.figure, f"Learning curve: {config.figure}"),
        }
    )
    print("\n".join([*lines(points, config.figure), f"learning curve: {output / PAGE}"]))


if __name__ == "__main__":
    exit_with(command)

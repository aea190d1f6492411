"""`python -m checkpoints.publish RUN --repo USER/NAME`: a trained component on the Hugging Face
Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from jsonargparse import ArgumentParser

from checkpoints.card import suggested_name
from checkpoints.export import refuse_unserved, trainable_class_of
from checkpoints.formats.known import FORMATS
from checkpoints.hub import REPORT, check_repo, publication, publish, write
from checkpoints.pretrained import find_folder, read_config
from configs.command_line.loading import exit_with, parse
from modules.target.loading import load_target


def make_parser() -> ArgumentParser:
    """The parser of `python -m checkpoints.publish`."""
    parser = ArgumentParser(
        prog="python -m checkpoints.publish",
        exit_on_error=False,
        description=(
            "Publish a trained component on the Hugging Face Hub, privately: weights, model card, "
            "report and provenance in one commit. The token is that of `hf auth login` or HF_TOKEN."
        ),
    )
    parser.add_argument("run", type=str, help="run folder or drafter folder")
    parser.add_argument(
        "--repo",
        type=str | None,
        help="USER/NAME on the Hub, created if there is none; USER alone: USER/<Target>-<Method>",
    )
    parser.add_argument(
        "--output", type=str | None, help="write the files into this folder instead; needs no token"
    )
    parser.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument("--private", action="store_true", help="for its owner only, as by default")
    parser.add_argument(
        "--report", type=str | None, help="report.json on it, or none [RUN/eval/report.json]"
    )
    parser.add_argument(
        "--row", type=str | None, help="the name of its rows in the report [the run's]"
    )
    parser.add_argument(
        "--license",
        type=str | None,
        help="of the component [the target's if it is known, else other]",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        help="put this engine's files beside ours, so that it reads the repository as it is",
    )
    parser.add_argument(
        "--target",
        type=str | None,
        help="with --format: the target, if its name does not lead to it",
    )
    return parser


def suggested_name_of(run: Path) -> str:
    """The name of a repository for a run: `<Target>-<Method>`."""
    config = read_config(find_folder(run))
    return suggested_name(config["class"], config["target"]["name"] or "target")


def report_of(folder: Path, chosen: str | None) -> Path | None:
    """The report to publish: the chosen one, or else the run's if it exists."""
    if chosen is not None:
        path = Path(chosen)
        return None if chosen == "none" else path / REPORT if path.is_dir() else path
    default = (folder.parent if folder.name == "drafter" else folder) / "eval" / REPORT
    return default if default.is_file() else None


def command(arguments: Sequence[str]) -> int:
    """Publish, or write the files to a folder, and print where they are.

    Raises:
        ValueError: contradicting flags, a fault of the run, or a refusal of the Hub.
    """
    chosen = parse(make_parser(), arguments)
    if chosen.public and chosen.private:
        raise ValueError("--public and --private contradict each other: give one")
    if (chosen.repo is None) == (chosen.output is None):
        raise ValueError(
            "give --repo USER/NAME to publish, or --output FOLDER to write the files there"
        )
    if chosen.target is not None and chosen.format is None:
        raise ValueError("--target is only read with --format: give both, or neither")
    # Both ways use the same files.
    folder, repo = Path(chosen.run), chosen.repo
    if repo is not None and "/" not in repo and folder.exists():
        check_repo(f"{repo}/NAME")
        repo = f"{repo}/{suggested_name_of(folder)}"
    if chosen.format is not None and folder.exists():
        refuse_unserved(trainable_class_of(folder), chosen.format)
    target = None if chosen.target is None else load_target(chosen.target, device="cpu")
    extras = (chosen.row, chosen.license, chosen.format, target)
    report = report_of(folder, chosen.report)
    disable_progress_bars()
    if repo is None:
        write(publication(folder, chosen.output, report, *extras), Path(chosen.output))
        print(f"written: {chosen.output}")
        print(f"its name on the Hub might be USER/{suggested_name_of(folder)}")
    else:
        print(f"published: {publish(folder, repo, not chosen.public, report, *extras)}")
    if report is None:
        print(
            "without figures of an evaluation: `python eval.py --drafters RUN --output RUN/eval` "
            "makes them"
        )
    return 0


if __name__ == "__main__":
    exit_with(command)

"""`python -m checkpoints.export --format F RUN OUT`: a trained drafter in the format of a serving
engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from checkpoints.folders import CONFIG, PICKLED, write_json, write_tensors
from checkpoints.formats.exported import Exported
from checkpoints.formats.known import FORMATS, formats_of, unserved
from checkpoints.pretrained import (
    find_folder,
    load_pretrained,
    read_config,
    target_of,
    trainable_class,
)
from configs.command_line.loading import exit_with, parse
from modules.contracts.target import Target
from modules.runtime.files import whole_folder
from modules.target.loading import load_target


def export(name: str | Path, form: str, out: Path, target: Target | None = None) -> Exported:
    """Write a drafter in an engine's format, atomically.

    Args:
        name: run folder, drafter folder or Hub id.
        form: one of `FORMATS`.
        out: folder to write; it must be new or empty.
        target: the target that the drafter was trained for; None loads it by name.

    Raises:
        ValueError: no engine serves such a drafter, this format does not hold it, or its settings
            cannot be expressed.
    """
    refuse_unserved(trainable_class_of(name), form)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists: give a new folder")
    target = target or load_target(target_of(name), device="cpu")
    drafter = load_pretrained(name, target).to("cpu")
    with torch.no_grad():
        exported = FORMATS[form].exported(drafter, target)
    write(exported, out)
    return exported


def trainable_class_of(name: str | Path) -> type:
    """The class of a saved component, without loading it."""
    config = read_config(find_folder(name))
    return trainable_class(config["drafter_type"], config["class"])


def refuse_unserved(kind: type, form: str) -> None:
    """Raise ValueError unless the format holds drafters of this class."""
    if form not in FORMATS:
        raise ValueError(f"--format {form!r} is unknown: use one of {', '.join(FORMATS)}")
    forms = formats_of(kind)
    if not forms:
        reason = unserved(kind) or f"no engine serves {kind.__name__}"
        raise ValueError(f"{reason}: use this project's decoder (the model card shows how)")
    if form not in forms:
        raise ValueError(f"--format {form} holds no {kind.__name__}: use {' or '.join(forms)}")


def write(exported: Exported, out: Path) -> None:
    """Write the folder of an export. PyTorch files are written only for engines that read nothing
    else, and hold plain tensors.
    """
    with whole_folder(out) as fresh:
        write_json(fresh / CONFIG, exported.config)
        for name in exported.weights:
            if name in PICKLED:
                torch.save(
                    {key: tensor.clone() for key, tensor in exported.tensors.items()}, fresh / name
                )
            else:
                write_tensors(fresh / name, exported.tensors)
        for name, tensors in exported.shards.items():
            write_tensors(fresh / name, tensors)
        for file in exported.copied:
            shutil.copyfile(file, fresh / file.name)
        if exported.tokenizer is not None:
            exported.tokenizer.save_pretrained(fresh)


def make_parser() -> ArgumentParser:
    """The parser of `python -m checkpoints.export`."""
    parser = ArgumentParser(
        prog="python -m checkpoints.export",
        exit_on_error=False,
        description=(
            "Write a trained drafter as a serving engine loads it: "
            + "; ".join(
                f"{name} ({module.DRAFTER.__name__}: {', '.join(module.ENGINES)})"
                for name, module in FORMATS.items()
            )
        ),
    )
    parser.add_argument(
        "--format", required=True, choices=list(FORMATS), help="the format to write"
    )
    parser.add_argument(
        "--target", type=str | None, help="the drafter's target, if its name does not lead to it"
    )
    parser.add_argument("run", type=str, help="run folder, drafter folder or Hub id")
    parser.add_argument("out", type=str, help="folder to write")
    return parser


def command(arguments: Sequence[str]) -> int:
    """Export, and print how an engine is started with the result."""
    chosen = parse(make_parser(), arguments)
    target = None if chosen.target is None else load_target(chosen.target, device="cpu")
    exported = export(chosen.run, chosen.format, Path(chosen.out), target)
    print(f"exported: {chosen.out}")
    for note in exported.notes:
        print(f"note: {note}")
    print(exported.usage.replace("FOLDER", chosen.out))
    return 0


if __name__ == "__main__":
    exit_with(command)

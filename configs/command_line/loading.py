"""Config files by name, and command lines whose mistakes are one line."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from configs.command_line import class_paths as classes
from configs.command_line.bounded_yaml import read_config
from configs.command_line.endings import Stopped, disk_message, disk_trouble, stoppable
from configs.command_line.progress import quieten
from configs.command_line.redaction import printable, redacted
from configs.command_line.unknown_keys import Config, check_keys, check_nulls, explained
from configs.command_line.work_share import Share

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = ("drafters", "judges", "preference")
"""Folders of configs/ whose files name a trained component (`drafter`)."""
DEFAULTS = {"drafters": "drafter.yaml", "preference": "preference.yaml"}
"""Files of configs/defaults/ that are merged before the recipes of a folder of configs/."""
SECTIONS = (
    "seed",
    "objective",
    "drafter",
    "data",
    "optimizer",
    "trainer",
    "probe",
    "checkpoint",
    "publish",
)
"""Sections of a recipe besides its target."""
Command = Callable[[Sequence[str]], int]
"""Arguments of a command line -> exit status."""
_FLAG = "--config"
_ALLOW = "--allow_package"
_DENIED = re.compile(r"Importing '([^']+)' is not allowed, .*")
_SUBJECT = re.compile(r'Parser key "([^"]+)"')
_TYPE = re.compile(r"<class '(?:builtins\.)?([\w.]+)'>")
_CALLABLE = re.compile(r"Type \S*Callable\[.*\] expects a function or a callable class[:;.]?\s*")
_NO_NUMBER = re.compile(r"expected (?:float|int)\. Got value: ([-+.]*(?:nan|inf)\w*)", re.I)
_CHOICES = re.compile(r"[Ee]xpected (?:a )?typing\.Literal\[(.+?)\]\. Got value: ")
_REQUIRED = re.compile(r"^the following arguments are required: (.+)$")
_NAMESPACE = re.compile(r"\.? ?Got value: Namespace\(.*\)$", re.MULTILINE)
_WRAPPING = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Problem with given class_path",
    "- Expected a <class 'NoneType'>",
)


def resolve(name: str, folder: Path = CONFIGS) -> Path:
    """The config file called `name`: a path, or else a file under configs/ (with or without
    `.yaml`), whose folder may be omitted.

    Raises:
        ValueError: no such file (the message lists the closest names), or several (it lists them).
    """
    # A path, as it is or under configs/.
    candidates = [Path(name), folder / name, folder / f"{name}.yaml"]
    exact = next((path for path in candidates if path.is_file()), None)
    if exact is not None:
        return exact
    # A name alone, in any folder.
    inside = [path for path in folder.rglob("*.yaml") if name in (path.name, path.stem)]
    if len(inside) == 1:
        return inside[0]
    if inside:
        paths = " and ".join(sorted(str(path.relative_to(folder)) for path in inside))
        raise ValueError(f"--config {name!r} may mean {paths}: give the folder too")
    # Nothing: suggest close names.
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise ValueError(
        f"--config {name!r} is neither a file nor a config: try {', '.join(close) or 'a path'}"
    )


def recipes(folder: Path = CONFIGS) -> list[Path]:
    """The shipped recipes, sorted by name."""
    paths = [path for name in RECIPES for path in (folder / name).glob("*.yaml")]
    return sorted(filter(is_recipe, paths), key=lambda path: path.name)


def is_recipe(path: Path) -> bool:
    """Whether a shipped config names a trained component (other settings beside recipes do not)."""
    return "drafter" in yaml.safe_load(path.read_text())


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with every `--config NAME` replaced by `--config PATH` (several merge left
    to right), and the defaults of a recipe before it.
    """
    resolved: list[str] = []
    expecting = False
    for word in arguments:
        # The file, from `--config NAME` or `--config=NAME`.
        place, file = len(resolved) - expecting, None
        if expecting:
            file = resolve(word)
            word = str(file)
        elif word.startswith(_FLAG + "="):
            file = resolve(word[len(_FLAG) + 1 :])
            word = f"{_FLAG}={file}"
        expecting = not expecting and word == _FLAG
        resolved.append(word)
        # The recipe's defaults go before its `--config`.
        default = None if file is None else default_of(file)
        if default is not None:
            resolved[place:place] = [_FLAG, str(default)]
    return resolved


def default_of(path: Path) -> Path | None:
    """The file of configs/defaults/ that is merged before a shipped recipe; None for other files,
    also for those beside recipes that name no `drafter`.
    """
    folder = path.resolve().parent
    name = DEFAULTS.get(folder.name) if folder.parent == CONFIGS else None
    return None if name is None or not is_recipe(path) else CONFIGS / "defaults" / name


def first_config(paths: Sequence[Any]) -> Path:
    """The first config that was named on the command line."""
    named = (Path(str(path)) for path in paths)
    return next(path for path in named if path.resolve().parent != CONFIGS / "defaults")


def without_packages(arguments: Sequence[str]) -> list[str]:
    """The command line without `--allow_package NAME`; these packages are allowed from now on.

    The flag is no key of the parser, so no config can set it.
    """
    remaining: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, name = word.partition("=")
        if flag != _ALLOW:
            remaining.append(word)
            continue
        name = name if equals else next(words, "")
        if not name:
            raise ValueError(f"{_ALLOW}: name a package whose classes configs may name")
        classes.allow([name])
    return remaining


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse a command line whose parser has `exit_on_error=False` and a `--config` argument.

    Raises:
        ValueError: an unknown key, a wrong type, a missing file, a class that configs may not name,
            or YAML beyond its bounds; the message is one line that names the key.
    """
    # 1. Names of configs to paths, and the defaults of recipes.
    words = resolve_arguments(without_packages(arguments))
    files = [
        Path(word.removeprefix(_FLAG + "="))
        for word, before in zip(words, ["", *words])
        if before == _FLAG or word.startswith(_FLAG + "=")
    ]
    # 2. Keys first: the parser's own messages name neither file nor alternatives.
    configs = [Config(file, read_config(file)) for file in files]
    for config in configs:
        check_keys(parser, config)
    # 3. Parse, with its message folded into one line.
    try:
        settings = parser.parse_args(words)
    except (argparse.ArgumentError, TypeError, RecursionError) as error:
        raise ValueError(explained(one_line(str(error)), parser, configs)) from error
    check_nulls(parser, settings)
    return settings


def one_line(message: str) -> str:
    """A parser's message folded into one line: the innermost key, the problem, and the value."""
    # What is missing, or a class outside of the allowed packages.
    denied, required = _DENIED.search(message), _REQUIRED.search(message)
    if required:
        return "give " + " and ".join(f"--{key.strip()}" for key in required[1].split(","))
    if denied:
        keys = ".".join(dict.fromkeys(_SUBJECT.findall(message)))
        return f"{keys}: {classes.refused(denied[1])}".removeprefix(": ")
    # The innermost value, and lines that say what is wrong.
    message = _NAMESPACE.sub("", _CALLABLE.sub("", message))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    keys = _SUBJECT.findall(message)
    values = [
        line.removeprefix("Given value: ") for line in lines if line.startswith("Given value:")
    ]
    value = values[-1] if values else None
    reasons = [
        line.removeprefix("- ")
        for line in lines
        if not line.startswith((*_WRAPPING, "Given value"))
    ]
    # Without types in angle brackets, repetitions and the library's wrapping.
    text = "; ".join(dict.fromkeys(_SUBJECT.sub("", line).strip(": ") for line in reasons))
    text = _TYPE.sub(r"\1", text).replace("Expected a ", "expected ").strip("; ")
    text = _CHOICES.sub(r"must be one of \1, got ", text)
    text = _NO_NUMBER.sub(r"expected a finite number, got \1", text)
    subject = f"{'.'.join(dict.fromkeys(keys))}: " if keys else ""
    return f"{subject}{text}" + (
        f", got {value!r}" if value is not None and repr(value) not in text else ""
    )


def run(command: Command, arguments: Sequence[str]) -> int:
    """Call an entry point; returns its exit status, and prints a user's mistake in one line.

    Status 2 is a user's mistake (`ValueError`) or a disk error, 130 is Ctrl-C, 143 is SIGTERM.
    """
    try:
        with stoppable():
            return command(arguments)
    except ValueError as error:
        return _fail(str(error))
    # Of several processes the first one prints.
    except Stopped as stopped:
        if Share.of_process().index == 0:
            print(stopped, file=sys.stderr)
        return stopped.status
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        return _fail(disk_message(trouble))


def exit_with(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None
) -> None:
    """Call an entry point on the command line's arguments, and exit with its status."""
    sys.exit(run(command, sys.argv[1:] if arguments is None else arguments))


def flags(
    source: Callable[..., Any], arguments: Sequence[str], name: str, description: str
) -> dict[str, Any]:
    """The values of the flags of `python -m NAME`, which are the parameters of a function or of a
    settings class.

    Raises:
        ValueError: as `parse`.
    """
    parser = ArgumentParser(prog=f"python -m {name}", exit_on_error=False, description=description)
    if isinstance(source, type):
        parser.add_class_arguments(source, fail_untyped=True)
    else:
        parser.add_function_arguments(source, fail_untyped=True)
    values = vars(parse(parser, arguments))
    quieten()
    return values


def called(
    function: Callable[..., None], arguments: Sequence[str], name: str, description: str
) -> int:
    """Call a function whose parameters are the flags of `python -m NAME`; returns the exit status.

    Raises:
        ValueError: as `parse`, and what the function raises.
    """
    function(**flags(function, arguments, name, description))
    return 0


def _fail(words: str) -> int:
    print(f"error: {redacted(printable(words))}", file=sys.stderr)
    return 2


def accept_recipes(parser: ArgumentParser, reads: Collection[str] = ()) -> None:
    """Let a command's parser accept recipes: it reads the sections `reads` (besides target and
    dtype) and ignores the others.
    """
    for section in SECTIONS:
        if section not in reads:
            parser.add_argument(f"--{section}", type=Any, help=argparse.SUPPRESS)


def config_parser(prog: str, description: str, **options: Any) -> ArgumentParser:
    """A parser with `--config` that raises instead of exiting."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, **options)
    parser.add_argument(
        _FLAG, action="config", help="a path, or a file under configs/; several merge left to right"
    )
    return parser

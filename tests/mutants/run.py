"""`python -m tests.mutants.run [WORD ...]`: plant each listed fault in a copy of the code and run
its tests there.

A fault is caught when its tests fail, after the files of those tests have passed on the code as it
is, in one run. The lists are the YAML files of this folder; with words, only faults whose name or
file contains one of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1
"""pytest's exit status; anything above means that it did not get as far as running the tests."""


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which stands once in `file`, becomes `new`; `tests` are what pytest must then
    fail on.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, code: str) -> str:
        """The code with the fault.

        Raises:
            ValueError: `old` does not stand there exactly once.
        """
        found = code.count(self.old)
        if found != 1:
            raise ValueError(
                f"mutant {self.name!r}: `old` stands {found} times in {self.file}, must be once: "
                "bring it up to date"
            )
        return code.replace(self.old, self.new)


def mutants(words: list[str] | None = None) -> list[Mutant]:
    """All that are listed, or those whose name or file contains one of the words."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text()) or ():
            found.append(Mutant(**{**entry, "tests": tuple(entry["tests"].split())}))
    return [
        one for one in found if not words or any(word in f"{one.name} {one.file}" for word in words)
    ]


def copied(folder: Path) -> None:
    """Copy the working tree without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def tested(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest, which ends at the first failure."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


def places(chosen: list[Mutant]) -> tuple[str, ...]:
    """The test files and folders that the faults name, each once."""
    return tuple(
        dict.fromkeys(part for one in chosen for part in one.tests if part.startswith("tests/"))
    )


def main() -> None:
    """Run the faults; exit status 1 if one was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only faults whose name or file contains one of these"
    )
    chosen, missed = mutants(parser.parse_args().words), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        # The tests must pass on the code as it is: otherwise their failure says nothing.
        status, output = tested(folder, places(chosen)) if chosen else (PASSED, "")
        if status != PASSED:
            sys.exit(f"{output}\nthese tests do not pass on the code as it is")
        for one in chosen:
            path = folder / one.file
            code, start = path.read_text(), time.perf_counter()
            path.write_text(one.planted(code))
            status, output = tested(folder, one.tests)
            path.write_text(code)
            verdict = {PASSED: "NOT CAUGHT", FAILED: "caught"}.get(
                status, f"pytest ended with {status}"
            )
            print(
                f"{verdict:<12} {one.name} ({one.file}, {time.perf_counter() - start:.0f} s)",
                flush=True,
            )
            if status != FAILED:
                missed.append(one.name)
                print(output if status != PASSED else "", end="")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

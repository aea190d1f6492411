"""The console scripts `slipstream-train` and `slipstream-eval`: `python train.py` and
`python eval.py` of an installation.
"""

from __future__ import annotations


def train() -> None:
    """Run `train.cli.main`, which is imported first here."""
    from train.cli import main

    main()


def evaluate() -> None:
    """Run `eval.cli.main`, which is imported first here."""
    from eval.cli import main

    main()

"""Train a drafter: `python train.py --config clover.yaml` (see `--help`)."""

from train.cli import main

if __name__ == "__main__":
    main()

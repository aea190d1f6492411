"""Measure drafters: `python eval.py --config eval/smoke.yaml --drafters runs/clover` (see
`--help`).
"""

from eval.cli import main

if __name__ == "__main__":
    main()

"""Draws the held-out curves of several runs of run_clm.py in one plot, and prints their last values.

python -m scripts.studies.compare_curves --output runs/comparison.png multipole=runs/quickstart "full attention=runs/quickstart-full"
"""

import argparse
import json
import sys
from pathlib import Path

from hf_multipole.training.figures import plot_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to draw")
    args = parser.parse_args()
    figures = {}
    for run in args.runs:
        name, _, folder = run.partition("=")
        path = Path(folder) / "figures.json"
        if not path.is_file():
            sys.exit(f"compare_curves.py: {run!r} must be NAME=FOLDER, with a folder that run_clm.py wrote (it has no figures.json)")
        figures[name] = json.loads(path.read_text())
    baselines = {name: value for name, value in next(iter(figures.values()))["bits_per_byte"].items() if name != "this model"}
    plot_curves({name: run["curve"] for name, run in figures.items()}, baselines, args.output)
    for name, run in figures.items():
        print(f"{name}: {run['bits_per_byte']['this model']:.3f} bits per byte, {run['parameters']:,} parameters")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

"""What every report has: the command that made it, tables in Markdown, and the figures in a JSON file beside it."""

import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_multipole.training.checkpoints import write_json


def command() -> str:
    """The command line of this process."""
    module = sys.modules["__main__"].__spec__  # none where a file was run
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """The first ``words`` columns to the left, numbers to the right."""
    align = ["---" if i < words else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, align, *rows))


def rounded(x):
    """The same figures to six digits, at any depth; what is not finite, as a word, for JSON has no number for it."""
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else str(x)
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list | tuple) else x


def write_figures(path: Path, title: str, figures: str) -> None:
    """A report: what was measured, below the heading "Figures"; what someone wrote above it stays."""
    before = path.read_text().split("## Figures\n")[0] if path.is_file() else f"# {title}\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}## Figures\n{figures}")


def write_beside(report: Path, record: dict) -> None:
    """The figures of a finished run, as JSON beside its report, so that it can be drawn and told anew."""
    report.parent.mkdir(parents=True, exist_ok=True)
    write_json(report.with_suffix(".json"), json.loads(json.dumps(rounded(record))))

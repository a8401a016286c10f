"""Command lines, as someone gives them: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """That of this process; a clone is found from any folder, the Hub is not asked, and one thread serves each process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(module: str, *arguments, cwd: Path, fails: bool = False) -> str:
    """What ``python -m module arguments`` printed, in the folder ``cwd``; its errors where it has to fail."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout

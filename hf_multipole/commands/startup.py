"""What a command line does before torch is imported: it answers --help and wrong options, and says how threads wait for each other.

The package calls :func:`begin` first of all. In a process that is none of its command lines nothing happens then.
"""

import os
import sys
from pathlib import Path

# The files in scripts/, and what each of them runs.
SCRIPTS = {
    "run_clm.py": "train-clm",
    "run_mlm.py": "train-mlm",
    "evaluate_lm.py": "evaluate",
    "generate.py": "generate",
    "convert.py": "convert",
}
_FOLDER = Path(__file__).parents[2] / "scripts"
_MODULE = "hf_multipole.commands"


def running() -> tuple[str | None, ...] | None:
    """``(command,)`` of a process that is one of the command lines, None where the first argument names it; None of any other process."""
    program = (getattr(sys, "argv", None) or [""])[0]
    path = Path(program)
    if path.name in SCRIPTS and path.resolve().parent == _FOLDER:
        return (SCRIPTS[path.name],)
    # While Python looks for a module, "-m" stands in the place of its path.
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if program == "-m" and "-m" in sys.orig_argv else []
    if path.stem == "hf-multipole" or module == [_MODULE] or path.resolve() == Path(__file__).with_name("__main__.py"):
        return (None,)
    return None


def begin() -> None:
    """Ends the process where its command line asks for help, or cannot be read."""
    if found := running():
        from .parsers import read

        read(*found)
        # Threads that spin while they wait take the cores from those that they wait for, where other processes have a share of them.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""Command lines, as someone gives them: in a process of their own."""

import os
import runpy
import sys
import tempfile
from pathlib import Path

from tests.helpers.processes import JOIN, start


def _run(module, arguments, cwd, log):
    assert "tests.helpers.preloaded" in sys.modules, "the server imported nothing, which makes every process slow"
    for stream, name in ((1, "out"), (2, "err")):
        with open(Path(log, name), "w") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(cwd)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(module: str, *arguments, cwd: Path, fails: bool = False) -> str:
    """What ``python -m module arguments`` printed, in the folder ``cwd``; its errors where it has to fail."""
    with tempfile.TemporaryDirectory() as log:
        process = start(_run, module, [str(part) for part in arguments], str(cwd), log)
        process.join(JOIN)
        process.kill()
        out, errors = (Path(log, name).read_text() for name in ("out", "err"))
    assert process.exitcode is not None, f"the command does not end: {errors[-3000:]}"
    assert (process.exitcode != 0) == fails, errors[-3000:]
    return errors if fails else out

"""Runs a command: ``python -m hf_multipole.commands COMMAND ...``, ``hf-multipole COMMAND ...``, or a file in scripts/."""

import importlib
import sys

from .parsers import read


def main(command: str | None = None) -> None:
    """command: by default the first argument names it."""
    module, options = read(command)
    try:
        importlib.import_module(f".{module}", __package__).run(options)
    except KeyboardInterrupt:
        print(f"\n{options.program}: interrupted", file=sys.stderr)
        # What a shell says of a process that was interrupted.
        sys.exit(130)


if __name__ == "__main__":
    main()

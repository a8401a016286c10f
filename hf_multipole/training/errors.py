"""What goes wrong in a command, in one line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from .hub import NETWORK_ERRORS

# What a user can put right: told in one line. Anything else is our own mistake, and shows its traceback.
BAD_INPUT = (ValueError, ImportError, StrictDataclassError, HFValidationError, SafetensorError, *NETWORK_ERRORS)

Found = TypeVar("Found")


def one_line(error: BaseException) -> str:
    # A configuration's own error is the cause of the one that its class raises.
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return " ".join(str(cause).split()) or type(cause).__name__


def fail(program: str, error: BaseException) -> None:
    """Ends the process with one line; of several processes, which all fail alike, the first one writes it."""
    sys.exit(f"{program}: {one_line(error)}" if os.environ.get("RANK", "0") == "0" else 1)


@contextmanager
def told_in_a_line(program: str, *more: type[BaseException]) -> Iterator[None]:
    """Ends the process with one line where what a user can put right, or one of ``more``, is raised inside."""
    try:
        yield
    except (*BAD_INPUT, *more) as error:
        fail(program, error)


def load(what: str, name: str, from_pretrained: Callable[..., Found], **options) -> Found:
    """``from_pretrained(name, **options)``. Raises OSError, in one line, where there is no such checkpoint, as ``what`` calls it."""
    try:
        return from_pretrained(name, **options)
    except (OSError, HFValidationError) as error:
        if Path(name).is_dir():
            raise OSError(f"{what} {name} cannot be loaded: {one_line(error)}") from error
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        reason = "the Hub did not answer"
        for kind, words in _REASONS.items():
            if any(isinstance(cause, kind) for cause in causes):
                reason = words
                break
        raise OSError(f"there is no {what} {name}: no folder has that name, and {reason}") from error


# First come the kinds that others are made from.
_REASONS = {
    GatedRepoError: "the one on the Hub is gated: ask for access there, and log in with hf auth login",
    RevisionNotFoundError: "the one on the Hub has no such revision",
    RepositoryNotFoundError: "the Hub has none, or a private one: log in with hf auth login",
    HFValidationError: "it can be no name on the Hub",
}

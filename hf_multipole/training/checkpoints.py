"""Checkpoints that survive an interruption: complete or not there at all.

A checkpoint counts once its marker is there, which is written last and lists every file with its size and checksum.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

MARKER = "complete.json"
RUN = "run.json"
# What a run leaves in its folder, as patterns.
_TRACES = ("checkpoint-*", "figures.json", RUN, "config.json", "*.safetensors", "README.md")


def write_json(path: Path, content) -> None:
    """Written beside and moved, so that a half-written file is never taken for a whole one."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def mark(folder: Path) -> None:
    """Declares a checkpoint complete. Its files are on the disk before its marker is."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    write_json(folder / MARKER, {"files": files})


def clear(folder: Path) -> None:
    """Before a checkpoint is written: takes away what an interrupted one left at its place, the marker first."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has its marker, in words, or None."""
    try:
        files = json.loads((folder / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its marker {MARKER} cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, but {expected['bytes']} were written"
        if _checksum(path) != expected["crc32"]:
            return f"{name} is not what was written"
    return None


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run that have their marker, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and (path / MARKER).is_file()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def resumes(request: str | bool | None) -> bool:
    """Whether resume_from_checkpoint asks for anything."""
    return str(request).lower() not in ("none", "false")


def choose(folder: Path, request: str | None, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; None to start from the beginning.

    request: None or "false" for a new run; "true" for the newest complete checkpoint; "intact" for the newest complete one whose
    files are what was written, passing over damaged ones; or the folder of a checkpoint.
    Raises ValueError and OSError where that is not possible, with what is.
    """
    if not resumes(request):
        return None
    if str(request).lower() not in ("true", "intact"):
        folder = Path(request)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no checkpoint folder {request}")
        if not (folder / MARKER).is_file():
            others = [str(path) for path in complete(folder.parent)[:1]]
            hint = f"; the newest complete one is {others[0]}" if others else ""
            raise ValueError(f"{request} is not complete: writing it was interrupted{hint}")
        if wrong := damage(folder):
            raise ValueError(f"{request} is damaged: {wrong}{_previous(folder)}")
        return _with_states(folder)
    if not (folder / RUN).is_file():
        raise ValueError(f"there is no run in {folder} to go on with; leave resume_from_checkpoint out to start one")
    for checkpoint in complete(folder):
        wrong = damage(checkpoint)
        if wrong is None:
            return _with_states(checkpoint)
        if str(request).lower() == "true":
            raise ValueError(f"{checkpoint} is damaged: {wrong}{_previous(checkpoint)}")
        note(f"{checkpoint} is passed over: {wrong}")
    note(f"{folder} has no complete checkpoint: the run starts from the beginning")
    return None


def _with_states(checkpoint: Path) -> Path:
    if not (checkpoint / "scheduler.pt").is_file():
        raise ValueError(f"{checkpoint} holds no state of the optimizer (save_only_model): start anew from it as model_name_or_path")
    return checkpoint


def _previous(checkpoint: Path) -> str:
    """How to go on from the checkpoint before a damaged one."""
    step = int(checkpoint.name[11:]) if checkpoint.name[11:].isdecimal() else 0
    for other in complete(checkpoint.parent):
        if int(other.name[11:]) < step and damage(other) is None:
            return f"; go on from the one before with --resume_from_checkpoint {other}, or the newest undamaged with intact"
    return "; there is no undamaged one before it"


def claim(folder: Path, run: dict, resuming: bool) -> None:
    """Checks that a folder is new, or holds the very run that goes on. Raises ValueError where something would be overwritten.

    run: what the run is made of, as JSON.
    """
    known = None
    if (folder / RUN).is_file():
        try:
            known = dict(json.loads((folder / RUN).read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{folder / RUN} cannot be read: take that folder away, or give another output_dir") from None
    if resuming:
        for name, value in run.items():
            if known is not None and known.get(name) != value:
                raise ValueError(
                    f"{folder} was begun with {name} {known.get(name)!r}, not {value!r}: go on with the same, or start anew elsewhere"
                )
        return
    traces = [path.name for pattern in _TRACES for path in sorted(folder.glob(pattern))]
    # A run that ended before its first checkpoint leaves nothing to lose.
    if traces not in ([], [RUN]):
        newest = next(iter(complete(folder)), None)
        found = f"up to {newest.name}" if newest else traces[0]
        raise ValueError(
            f"output_dir {folder} holds another run ({found}): give another output_dir, or go on with that one by "
            "--resume_from_checkpoint true"
        )

"""The documentation: links lead somewhere, snippets run, command lines can be read, and the short ones run one after the other."""

import argparse
import ast
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import pytest
import tomllib
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from hf_multipole.commands import parsers, startup
from hf_multipole.training.parsing import KINDS, MASKED_KINDS, parse

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.md", "*/README.md", "model_cards/**/*.md")
        for path in ROOT.glob(pattern)
        if path.relative_to(ROOT).parts[0] != "runs"
    }
)
# What a newcomer reads, in this order. Its blocks that are marked "long" or "gpu" take too much time, or a machine that is not here.
FIRST = ["README.md", "hf_multipole/README.md", "scripts/README.md"]
BLOCK = re.compile(r"^ *```(\w*) ?([^\n]*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def blocks(page: str, *kinds: str) -> list[tuple[str, str, str]]:
    """Language, mark and text of each block of code of a page."""
    return [block for block in BLOCK.findall((ROOT / page).read_text()) if block[0] in kinds]


def test_pages_are_found():
    assert {*FIRST, "model_cards/README.md", "model_cards/reports/recall.md"} <= set(PAGES)


# Links


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", (ROOT / page).read_text())
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    used = re.findall(r"\]\[([^\]]+)\]", text)
    assert sorted(set(used)) == sorted(defined)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *defined.values()]:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_report_has_its_line_in_the_index():
    index = (ROOT / "model_cards" / "README.md").read_text()
    for page in PAGES:
        if page.startswith("model_cards/reports/"):
            name = re.findall(rf"^\[(\w+)\]: reports/{Path(page).name}$", index, re.MULTILINE)
            assert len(name) == 1 and len(re.findall(rf"^- [^-]*\[{Path(page).stem}\]\[{name[0]}\]\.$", index, re.MULTILINE)) == 1, page


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("model_cards/reports/")])
def test_a_report_begins_with_three_findings_and_a_picture(page):
    title, gap, *findings, gap_2, picture = (ROOT / page).read_text().splitlines()[:7]
    assert title.startswith("# ") and not gap and not gap_2
    assert len(findings) == 3 and all(line.startswith("- ") for line in findings)
    assert re.fullmatch(r"!\[[^\]]+\]\([^)]+\)", picture)


def test_the_readme_in_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    headings = re.findall(r"^## (.*)$", BLOCK.sub("", text), re.MULTILINE)
    assert headings == ["Install", "Use", "Two commands", "What was measured", "Files"]
    assert len(re.findall(r"^\|", text, re.MULTILINE)) <= 2 + 6
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"`(\w+)`", text.partition("Extras")[2].partition("##")[0])
    assert set(named) == set(extras)


# The map of the package


def test_the_map_of_the_package_is_complete():
    page = (ROOT / "hf_multipole" / "README.md").read_text()
    tree, table = (page.split("\n## The map\n")[1].split("\n## ")[0].split("```")[i] for i in (1, 2))
    folder = ROOT / "hf_multipole"
    rooms = {path.name + "/" for path in folder.iterdir() if path.is_dir() and any(path.glob("[!_]*")) and path.name[0] != "_"}
    assert set(re.findall(r"^  (\w+/)", tree, re.MULTILINE)) == rooms
    named = re.findall(r"\w+", " ".join(re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE)).replace("files", ""))
    assert sorted(named) == sorted(path.stem for path in folder.glob("modeling/[!_]*.py"))


def test_the_path_of_a_forward_names_what_there_is():
    page = (ROOT / "hf_multipole" / "README.md").read_text()
    path = page.split("\n## The path of one forward\n")[1].split("\n## ")[0]
    files = {file.stem: file.read_text() for file in (ROOT / "hf_multipole" / "modeling").glob("*.py")}
    steps = re.findall(r"^\d\. \*\*(\w+)\*\*(?:, `([\w.]+)`)?", path, re.MULTILINE)
    assert len(steps) == 6
    for file, function in steps:
        assert re.search(rf"(def |^){function.rpartition('.')[2]}\b", files[file], re.MULTILINE), (file, function)
    for function in re.findall(r"`(\w+)`", path.partition("Other forwards")[2]):
        assert any(f"def {function}(" in text for text in files.values()), function


# Snippets


# Which take seconds each: of models of some size, on long rows.
LONG = {"README.md": pytest.mark.slow, "hf_multipole/README.md": pytest.mark.slow}
SNIPPETS = [(page, i, text) for page in PAGES for i, (_, _, text) in enumerate(blocks(page, "python")) if Path(page).name == "README.md"]


@pytest.mark.parametrize("text", [pytest.param(text, id=f"{page}-{i}", marks=LONG.get(page, ())) for page, i, text in SNIPPETS])
def test_snippets_run_as_they_stand(text, tmp_path, monkeypatch):
    """Each by itself, with its own imports."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    exec(compile(text, "snippet", "exec"), {"__name__": "__main__"})


# Command lines


class Read(Exception):
    """A program has read its command line."""


# Programs that only write down how they are called.
STAND_IN = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" >>"$CALLS"
printf '\\036\\0' >>"$CALLS"
"""
PROGRAMS = ("python", "pip", "accelerate", "torchrun", "bash", "hf-multipole")


def calls(script: str, folder: Path) -> list[list[str]]:
    """The programs that a shell would call for a script, and their arguments, in a copy of the repository that has no runs."""
    for name in PROGRAMS:
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(STAND_IN)
        (folder / "bin" / name).chmod(0o755)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for entry in ROOT.iterdir():
        if entry.name != "runs" and not (work / entry.name).exists():
            (work / entry.name).symlink_to(entry)
    (work / "runs").mkdir(exist_ok=True)
    log = folder / "calls"
    log.write_bytes(b"")
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(log)}
    bash = shutil.which("bash")
    assert subprocess.run([bash, "-n", "-c", script]).returncode == 0, script
    subprocess.run([bash, "-c", script], cwd=work, env=environment, capture_output=True)
    records = log.read_text().split("\x1e\0")[:-1]
    return [record.split("\0")[:-1] for record in records]


LINES = re.compile(r"^(?:    |)((?:python|accelerate|torchrun|hf-multipole) (?:.*\\\n)*.*)$", re.MULTILINE)


def help_of(command: str) -> str:
    """What ``hf-multipole command --help`` shows before the options."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), suppress(SystemExit):
        patch.setattr(sys, "argv", ["hf-multipole", command, "--help"])
        parsers.read(None)
    return printed.getvalue().partition("\noptions:\n")[0]


def shown() -> list[tuple[str, str]]:
    """The command lines in docstrings, by file, and in the help of the commands."""
    files = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("hf_multipole/**/*.py"), *ROOT.glob("tests/**/*.py")]
    words = {path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text()), clean=False) or "" for path in files}
    words |= {f"hf-multipole {command} --help": help_of(command) for command in parsers.COMMANDS}
    lines = {name: "\n".join(LINES.findall(text)) for name, text in words.items()}
    return [(name, script) for name, script in lines.items() if script]


def check_call(program: str, arguments: list[str], monkeypatch) -> None:
    """Fails where a program could not read its arguments, or a file that it is to run is not there."""
    if program == "python" and arguments[:1] == ["-"]:
        return
    if arguments[:2] in (["-m", "pytest"], ["-m", "pip"]):
        return check_call(arguments[1], arguments[2:], monkeypatch)
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install"
        for names in re.findall(r"\[(.*)\]", " ".join(arguments)):
            assert set(names.split(",")) <= set(extras)
    elif program == "pytest":
        assert all((ROOT / name).exists() for name in arguments if name.startswith("tests"))
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file()
    elif program in ("accelerate", "torchrun"):
        launcher = launch_command_parser() if program == "accelerate" else torchrun_parser()
        given = launcher.parse_args(arguments[1:] if program == "accelerate" else arguments)
        assert getattr(given, "config_file", None) is None or (ROOT / given.config_file).is_file()
        module = ["-m"] if given.module else []
        check_call("python", [*module, given.training_script, *given.training_script_args], monkeypatch)
    elif program == "hf-multipole" or arguments[:2] == ["-m", "hf_multipole.commands"]:
        command, *arguments = arguments if program == "hf-multipole" else arguments[2:]
        check_command(command, arguments, monkeypatch)
    else:
        module = arguments[0] == "-m"
        name, *arguments = arguments[module:]
        file = ROOT / (name.replace(".", "/") + ".py" if module else name)
        assert file.is_file()
        if file.name == "peers.py":
            # It runs another script, whose attention it adds to.
            name, *arguments = arguments
            file = ROOT / "scripts" / f"{name}.py"
        if file.name in startup.SCRIPTS:
            check_command(startup.SCRIPTS[file.name], arguments, monkeypatch)
        elif "tests" not in file.parts:  # which is not of this process: it chooses how Triton is imported
            check_module(".".join(file.relative_to(ROOT).with_suffix("").parts), arguments, monkeypatch)


def check_command(command: str, arguments: list[str], monkeypatch) -> None:
    """Reads the arguments of a command of the package."""
    if command in ("train-clm", "train-mlm"):
        if "--config" in arguments and arguments[arguments.index("--config") + 1].startswith("runs/"):
            place = arguments.index("--config")
            arguments = arguments[:place] + arguments[place + 2 :]
        # Of GPUs.
        parse([*arguments, "--bf16", "false"], MASKED_KINDS if command == "train-mlm" else KINDS)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["hf-multipole", command, *arguments])
            parsers.read(None)


def check_module(module: str, arguments: list[str], monkeypatch) -> None:
    """Runs a module until it has read its command line."""
    parse_args = argparse.ArgumentParser.parse_args

    def read(self, args=None, namespace=None):
        with suppress(SystemExit) if "--help" in arguments else nullcontext():
            parse_args(self, args, namespace)
        raise Read

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Read):
            runpy.run_module(module, run_name="__main__")


COMMANDS = [(page, "\n".join(text for _, _, text in blocks(page, "bash"))) for page in PAGES]
COMMANDS = [(page, script) for page, script in COMMANDS if script] + shown()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy, on modules that other tests have imported
@pytest.mark.parametrize(("page", "script"), [pytest.param(page, script, id=page) for page, script in COMMANDS])
def test_command_lines_can_be_read(page, script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = calls(script, tmp_path)
    assert found
    for program, *arguments in found:
        check_call(program, arguments, monkeypatch)
        if "reports" not in page:
            # Files that a reader does not have; what is read from runs/ an earlier command has written there.
            names = [name for name in arguments if re.search(r"\.(txt|md|json|yaml|csv|png|state)$", name)]
            assert all(name.startswith(("runs/", "model_cards/")) or (ROOT / name).exists() for name in names), names


@pytest.mark.parametrize(
    "line",
    [
        "python scripts/run_clm.py --train_file README.md --contxt_length 5",
        "python scripts/generate.py --model runs/first --prompt a --seeds 1",
        "python -m scripts.studies.nothing --list",
        "accelerate launch --nothing scripts/run_clm.py --train_file README.md",
        "accelerate launch --config_file configs/accelerate/nothing.yaml scripts/run_clm.py --train_file README.md",
        'pip install -e ".[nothing]"',
        "python -m pytest tests/test_nothing.py",
    ],
)
def test_faulty_command_lines_are_found(line, tmp_path, monkeypatch):
    ((program, *arguments),) = calls(line, tmp_path)
    with pytest.raises((SystemExit, AssertionError, ValueError, OSError)):
        check_call(program, arguments, monkeypatch)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path):
    """In a fresh clone, as they stand."""
    clone = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    # The console command, of the clone, whatever is installed here.
    (programs / "hf-multipole").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_multipole.commands "$@"\n')
    (programs / "hf-multipole").chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    scripts = [(page, text) for page in FIRST for _, mark, text in blocks(page, "bash") if not mark]
    assert len(scripts) >= 6
    for page, text in scripts:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}\n{text}\n{done.stderr[-3000:]}"
    made = {path.relative_to(clone).parts[0] for path in clone.rglob("*") if path.is_file()}
    assert made - {Path(name).parts[0] for name in listed.splitlines()} == {"runs"}

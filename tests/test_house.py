"""The rules of the house, read from the sources: who may import whom, and how long things may be.

Each rule is a function of a file's path and text that lists the faults it finds, and each is shown a file that breaks it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PARAMETERS, LINES, FILE_LINES, WIDTH = 12, 60, 500, 160

# Where a file lies, and what of this repository it may import; the first line that fits counts.
MAY_IMPORT = {
    "hf_multipole/__init__.py": ["hf_multipole.modeling", "hf_multipole.integration", "hf_multipole.commands.startup"],
    "hf_multipole/reference.py": [],
    "hf_multipole/modeling/": ["hf_multipole.modeling"],
    "hf_multipole/integration/": ["hf_multipole.modeling", "hf_multipole.integration"],
    "hf_multipole/training/": ["hf_multipole", "-hf_multipole.commands"],
    "hf_multipole/commands/": ["hf_multipole"],
    "scripts/common/": ["hf_multipole", "scripts.common"],
    "scripts/benchmarks/": ["hf_multipole", "scripts.common", "scripts.benchmarks"],
    "scripts/studies/": ["hf_multipole", "scripts.common", "scripts.studies"],
    "scripts/": ["hf_multipole"],
    "tests/": ["hf_multipole", "scripts", "tests.helpers"],
}
# The files of modeling/ that speak to Transformers. All others are mathematics, and know torch alone.
INTERFACE = {
    "attention_functions",
    "attention_masks",
    "configuration_multipole",
    "kept_layer",
    "kinds",
    "learned",
    "model_fingerprint",
    "model_inputs",
    "modeling_multipole",
    "multipole_cache",
    "private",
    "rotary",
    "tensor_cache",
    "tensor_layer",
}
# What Transformers copies to the Hub with a checkpoint; Transformers itself needs the last two.
OUTSIDE = {"torch", "transformers", "huggingface_hub", "safetensors"}
OF_KERNELS = re.compile(r"\w+_(triton|kernels)|triton_common")


class Fault(NamedTuple):
    where: str
    what: str


def sources() -> dict[str, str]:
    """Path and text of everything that is tracked, or would be."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    # A tree without git, as an archive unpacks it, has no files but its own.
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*")]
    return {name: (ROOT / name).read_text() for name in sorted(names) if name.endswith((".py", ".md")) and (ROOT / name).is_file()}


def imports(path: str, text: str):
    """Full names of the modules and things that a file imports, with their nodes."""
    package = path.removesuffix(".py").replace("/", ".").split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((f"{base}.{name.name}", node) for name in node.names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def functions(text: str):
    """Functions and methods by their full names."""

    def walk(node, names):
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = [*names, child.name]
                if not isinstance(child, ast.ClassDef):
                    yield ".".join(inner), child
            yield from walk(child, inner)

    yield from walk(ast.parse(text), [])


def has_reason(text: str, function: ast.FunctionDef, word: str) -> bool:
    """Whether a comment that begins with the word, ``# Long: why``, ends directly above the function and its decorators."""
    lines = text.splitlines()
    above = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    while above > 0 and lines[above - 1].strip().startswith("#"):
        above -= 1
        if re.match(rf"\s*# {word}: \S", lines[above]):
            return True
    return False


# The rules


def imports_one_way(path: str, text: str) -> list[Fault]:
    """scripts -> commands -> training, integration -> modeling; no study imports a benchmark, no test a test."""
    allowed = next((names for place, names in MAY_IMPORT.items() if path.startswith(place)), None)
    if not path.endswith(".py") or allowed is None:
        return []
    never = [name[1:] for name in allowed if name[0] == "-"]
    faults = []
    for name, _ in imports(path, text):
        if any(is_in(name, house) for house in ("hf_multipole", "scripts", "tests")):
            if any(is_in(name, one) for one in never) or not any(is_in(name, one) for one in allowed):
                faults.append(Fault(path, f"imports {name}"))
    return faults


def modeling_travels(path: str, text: str) -> list[Fault]:
    """Transformers copies ``from .name import thing`` and nothing else, and mathematics needs torch alone."""
    if not re.fullmatch(r"hf_multipole/modeling/\w+\.py", path):
        return []
    faults, stem = [], Path(path).stem
    allowed = OUTSIDE if stem in INTERFACE else {"torch"}
    allowed = allowed | {"triton"} if stem == "triton_common" else allowed
    for name, node in imports(path, text):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level != 1 or not node.module or "." in node.module:
                faults.append(Fault(path, f"has '{ast.unparse(node)}', which is not copied to the Hub"))
        elif (top := name.split(".")[0]) not in allowed | set(sys.stdlib_module_names):
            faults.append(Fault(path, f"imports {top}"))
    return faults


def kernels_apart(path: str, text: str) -> list[Fault]:
    """Triton is imported in one file, where it may be missing, and kernel files only where a kernel runs."""
    if not path.startswith("hf_multipole/") or not path.endswith(".py"):
        return []
    names = [(name, node) for name, node in imports(path, text)]
    if OF_KERNELS.fullmatch(Path(path).stem):
        tries = [range(node.lineno, node.end_lineno) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Try)]
        caught = [any(node.lineno in lines for lines in tries) for _, node in names]
        return [
            Fault(path, f"imports {name} outside of try") for (name, _), safe in zip(names, caught) if is_in(name, "triton") and not safe
        ]
    faults = [Fault(path, f"imports {name}") for name, _ in names if is_in(name, "triton")]
    for name, node in names:
        # Modules, not what is in them; from a module of this folder, or from the folder.
        parts = name.split(".") if "modeling" in name.split(".")[-2:] else name.split(".")[:-1]
        if node.col_offset == 0 and any(OF_KERNELS.fullmatch(part) for part in parts):
            faults.append(Fault(path, f"imports {name} before a kernel runs"))
    return faults


def few_parameters(path: str, text: str) -> list[Fault]:
    """Kernels aside; a reason begins with ``# Wide:``."""
    if not path.startswith("hf_multipole/modeling/") or not path.endswith(".py"):
        return []
    faults = []
    for name, function in functions(text):
        a = function.args
        count = len(a.posonlyargs + a.args + a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)
        kernel = any("jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in function.decorator_list)
        if count > PARAMETERS and not kernel and not has_reason(text, function, "Wide"):
            faults.append(Fault(f"{path}: {name}", f"has {count} parameters, of at most {PARAMETERS}"))
    return faults


def short_functions(path: str, text: str) -> list[Fault]:
    """Without their documentation; a reason begins with ``# Long:``."""
    if not path.startswith("hf_multipole/modeling/") or not path.endswith(".py"):
        return []
    faults = []
    for name, function in functions(text):
        lines = function.end_lineno - function.lineno + 1
        if ast.get_docstring(function, clean=False) is not None:
            lines -= function.body[0].end_lineno - function.body[0].lineno + 1
        if lines > LINES and not has_reason(text, function, "Long"):
            faults.append(Fault(f"{path}: {name}", f"has {lines} lines, of at most {LINES}"))
    return faults


def short_files(path: str, text: str) -> list[Fault]:
    count = text.count("\n")
    return [Fault(path, f"has {count} lines, of at most {FILE_LINES}")] if path.endswith(".py") and count > FILE_LINES else []


def narrow_text(path: str, text: str) -> list[Fault]:
    """Tables aside, which a line cannot be broken in."""
    if not path.endswith(".md"):
        return []
    return [
        Fault(path, f"has {len(line)} characters in line {i}, of at most {WIDTH}")
        for i, line in enumerate(text.splitlines(), 1)
        if len(line) > WIDTH and not line.lstrip().startswith("|")
    ]


RULES = [imports_one_way, modeling_travels, kernels_apart, few_parameters, short_functions, short_files, narrow_text]


@pytest.fixture(scope="module")
def tree():
    return sources()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(tree, rule):
    faults = [fault for path, text in tree.items() for fault in rule(path, text)]
    assert not faults, "\n" + "\n".join(f"{fault.where} {fault.what}" for fault in faults)


LONG = "def long():\n" + "    x = 1\n" * LINES
WIDE = f"def wide({', '.join(f'x{i}' for i in range(PARAMETERS))}, *more):\n    pass\n"


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (imports_one_way, "hf_multipole/modeling/summaries.py", "from ..training.data import pack"),
        (imports_one_way, "hf_multipole/modeling/summaries.py", "def f():\n    from hf_multipole import reference"),
        (imports_one_way, "hf_multipole/training/run.py", "from .. import commands"),
        (imports_one_way, "hf_multipole/integration/conversion.py", "import hf_multipole"),
        (imports_one_way, "hf_multipole/commands/generate.py", "import scripts.common"),
        (imports_one_way, "scripts/studies/recall.py", "from scripts.benchmarks import attention"),
        (imports_one_way, "scripts/common/peers.py", "from scripts.studies.recall import draw"),
        (imports_one_way, "tests/modeling/test_summaries.py", "from tests.modeling.test_hierarchy import x"),
        (imports_one_way, "tests/helpers/rows.py", "from tests.modeling import test_hierarchy"),
        (modeling_travels, "hf_multipole/modeling/summaries.py", "from . import hierarchy"),
        (modeling_travels, "hf_multipole/modeling/summaries.py", "import hf_multipole.reference"),
        (modeling_travels, "hf_multipole/modeling/summaries.py", "from transformers import PreTrainedModel"),
        (modeling_travels, "hf_multipole/modeling/modeling_multipole.py", "import datasets"),
        (kernels_apart, "hf_multipole/modeling/summaries.py", "from .summaries_triton import depthwise_map"),
        (kernels_apart, "hf_multipole/modeling/triton_common.py", "import triton.language as tl"),
        (kernels_apart, "hf_multipole/training/run.py", "def f():\n    import triton"),
        (few_parameters, "hf_multipole/modeling/summaries.py", WIDE),
        (few_parameters, "hf_multipole/modeling/summaries.py", "# Wide: a reason elsewhere\n\n" + WIDE),
        (short_functions, "hf_multipole/modeling/summaries.py", LONG),
        (short_functions, "hf_multipole/modeling/summaries.py", "# Long:\n" + LONG),
        (short_files, "tests/test_house.py", "\n" * (FILE_LINES + 1)),
        (narrow_text, "README.md", "| a table |\n" + "a" * (WIDTH + 1)),
    ],
)
def test_rules_find_faults(rule, path, text):
    assert len(rule(path, text)) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (imports_one_way, "hf_multipole/modeling/summaries.py", "import torch\nfrom .hierarchy import level_count"),
        (modeling_travels, "hf_multipole/modeling/modeling_multipole.py", "import math\nfrom transformers import PreTrainedModel"),
        (kernels_apart, "hf_multipole/modeling/summaries.py", "def f():\n    from .summaries_triton import depthwise_map"),
        (kernels_apart, "hf_multipole/modeling/triton_common.py", "try:\n    import triton\nexcept ImportError:\n    pass"),
        (few_parameters, "hf_multipole/modeling/summaries.py", "@triton.jit\n" + WIDE),
        (few_parameters, "hf_multipole/modeling/summaries.py", "# Wide: the interface, by name,\n# as published.\n@public\n" + WIDE),
        (short_functions, "hf_multipole/modeling/summaries.py", "# Long: one case after the other\n" + LONG),
        (short_functions, "hf_multipole/modeling/summaries.py", LONG.replace("x = 1", '"""' + "a\n" * 99 + '"""', 1)),
        (narrow_text, "README.md", "| " + "a" * (WIDTH + 1)),
    ],
)
def test_rules_let_pass(rule, path, text):
    assert not rule(path, text)

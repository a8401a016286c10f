"""A wheel that is built from a clone, in an environment that has no clone: it trains, evaluates and generates."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.helpers.processes import ROOT

pytestmark = pytest.mark.slow


def run(command, cwd, **environment) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"} | environment
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs of an environment with the wheel; the libraries are those of this one."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    folder = tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "-co", "--exclude-standard", "hf_multipole", "pyproject.toml", "README.md", "LICENSE"], ROOT)
    for name in listed.splitlines():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / "clone" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run([*build, folder / "clone"], folder)
    shutil.rmtree(folder / "clone")
    venv.create(folder / "environment", symlinks=os.name != "nt")
    programs = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
    own = run([programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # What a .pth file names is searched last, and the .pth files that lie there, such as that of a clone, are not read.
    with open(os.path.join(own, "libraries.pth"), "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    run([sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", wheel], folder)
    return programs


def test_the_wheel(installed, tmp_path):
    python, program = installed / "python", installed / "hf-multipole"
    assert str(installed.parent) in run([python, "-c", "import hf_multipole; print(hf_multipole.__file__)"], tmp_path)
    assert "train-mlm" in run([program, "--help"], tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    sizes = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, block_size: 8, rank: 2}"
    (tmp_path / "small.yaml").write_text(
        f"train_file: text.txt\ncontext_length: 64\nvalidation_split_percentage: 20\nmax_steps: 2\nconfig_overrides: {sizes}\n"
    )
    launch = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_multipole.commands"]
    run([*launch, "train-clm", "--config", "small.yaml"], tmp_path)
    card = (tmp_path / "runs" / "small" / "README.md").read_text()
    assert "hf-multipole train-clm --config small.yaml" in card and "bits per byte" in card
    run([program, "train-mlm", "--config", "small.yaml", "--use_cpu", "--output_dir", "runs/masked"], tmp_path)
    assert "masked accuracy" in (tmp_path / "runs" / "masked" / "README.md").read_text()
    run([program, "evaluate", "--model", "runs/small", "--file", "text.txt", "--context-lengths", "32", "--output", "figures"], tmp_path)
    assert json.loads((tmp_path / "figures" / "evaluation.json").read_text())["contexts"]["32"]["bits_per_byte"] > 0
    assert run([program, "generate", "--model", "runs/small", "--prompt", "the quick", "--max-new-tokens", "3"], tmp_path).startswith(
        "the quick"
    )

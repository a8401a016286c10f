"""What scripts/environment.sh installs, with programs in the place of pip and of the GPU's driver that say how they were called."""

import os
import subprocess

import pytest

from tests.helpers.processes import ROOT


@pytest.mark.parametrize("gpu", [False, True])
def test_the_build_of_torch(gpu, tmp_path):
    """It says what it downloads; without a GPU, the build for CPUs. A second time there is nothing to install."""
    programs = tmp_path / "environment" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    for name, lines in (("python", f'echo "$@" >>{tmp_path}/calls'), ("nvidia-smi", f"exit {int(not gpu)}")):
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"VENV": str(tmp_path / "environment"), "EXTRAS": "plot"}
    said = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", ". scripts/environment.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    torch, package = (tmp_path / "calls").read_text().splitlines()
    assert ("--extra-index-url https://download.pytorch.org/whl/cpu" in torch) == (not gpu) and torch.endswith(" torch")
    assert package.endswith("-e .[plot]") and "--extra-index-url" not in package
    assert ("for CPUs, 0.2 GB" in said[0]) == (not gpu) and ("with CUDA" in said[0]) == gpu and said[1] == ""

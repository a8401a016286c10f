# Sourced by the other scripts, in the repository's root: activates the virtual environment VENV (.venv), which is made, with
# the interpreter PYTHON (python3), where there is none, and filled with the package and the EXTRAS ("test,plot,triton") in their
# tested versions. It is filled once, and again when pyproject.toml or the tested versions change.

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
EXTRAS=${EXTRAS:-test,plot,triton}

if [ ! -f "$VENV/bin/activate" ]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Python 3.10 or later is needed, but $PYTHON is $("$PYTHON" --version 2>&1): name another one in PYTHON" >&2
        exit 1
    fi
    echo "Making the virtual environment $VENV"
    "$PYTHON" -m venv "$VENV"
fi
. "$VENV/bin/activate"

installed="$VENV/.installed-$EXTRAS"
wanted=$(cat pyproject.toml configs/constraints.txt | cksum)
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    # Where there is no GPU, PyTorch's own index has a build without the libraries for one, which pip prefers to the default one.
    build="the build of torch with CUDA, some 3 GB" index=""
    if ! nvidia-smi -L >/dev/null 2>&1; then
        build="the build of torch for CPUs, 0.2 GB" index="--extra-index-url https://download.pytorch.org/whl/cpu --retries 1"
    fi
    echo "Installing into $VENV what pip has to download: $build, and 0.1 GB of other packages (with the extra triton 0.2 GB more). A few minutes"
    # torch comes first, by itself: it is by far the largest part, and pip then keeps the build that it found.
    python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt $index torch
    python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e ".[$EXTRAS]"
    echo "$wanted" >"$installed"
fi

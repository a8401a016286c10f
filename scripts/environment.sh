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
    echo "Installing into $VENV"
    # torch comes first, by itself: it is by far the largest part, and pip then keeps the build that it found.
    python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt torch
    python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e ".[$EXTRAS]"
    echo "$wanted" >"$installed"
fi

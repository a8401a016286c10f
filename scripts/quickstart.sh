#!/usr/bin/env bash
# Trains a small multipole language model on the source text of Python's standard library, saves it, reloads it and lets it
# write; then reads a long file once, keeps what it remembers of it in a small file, and goes on from there. With --compare,
# models of as many parameters with the near field only and with full attention are trained as well, and the three curves
# drawn. The virtual environment is .venv, or $VENV; results are under runs/.
set -euo pipefail
cd "$(dirname "$0")/.."

compare=false
case "${1:-}" in
    "") ;;
    --compare) compare=true ;;
    *) echo "usage: bash scripts/quickstart.sh [--compare]" >&2; exit 2 ;;
esac

EXTRAS=${EXTRAS:-plot}
. scripts/environment.sh

out=runs/quickstart
# run_clm.py writes over no other run: what an earlier quickstart left makes room.
for folder in "$out" "$out-near-only" "$out-full"; do
    if [ -f "$folder/run.json" ] || [ -f "$folder/figures.json" ]; then
        echo "Replacing $folder"
        rm -r "$folder"
    fi
done
python scripts/run_clm.py --config configs/quickstart.yaml --output_dir "$out"
if $compare; then
    python scripts/run_clm.py --config configs/quickstart.yaml --output_dir "$out-near-only" --config_overrides '{far_bias_init: -10000}'
    python scripts/run_clm.py --config configs/quickstart.yaml --output_dir "$out-full" --config_overrides \
        '{layer_types: [full_attention, full_attention], intermediate_size: 618}'
    python -m scripts.studies.compare_curves --output "$out/comparison.png" "multipole=$out" "near field only=$out-near-only" "full attention=$out-full"
fi
python scripts/generate.py --model "$out" --prompt $'class Reader:\n    def __init__(self, path):' --max-new-tokens 200 --temperature 0.6 | tee "$out/sample.txt"
long=$(python -c "import argparse; print(argparse.__file__)")
echo
echo "A long text, $long, is read once into a state of fixed size, and gone on from more than once:"
python scripts/generate.py --model "$out" --prompt-file "$long" --max-new-tokens 0 --save-state "$out/long.state"
for prompt in $'\nclass Action' $'\ndef main('; do
    python scripts/generate.py --model "$out" --load-state "$out/long.state" --prompt "$prompt" --max-new-tokens 40
done
echo "The model is in $out, its card is $out/README.md, its figures are $out/figures.json, the sample is $out/sample.txt"

"""Trains a masked language model with Trainer. Arguments as in run_clm.py, and those of MaskingArguments.

python scripts/run_mlm.py --config configs/wikitext-103-masked.yaml
"""

from hf_multipole.training.run import run

if __name__ == "__main__":
    run("run_mlm.py", masked=True)

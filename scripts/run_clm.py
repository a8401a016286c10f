"""Trains a causal language model with Trainer.

    python scripts/run_clm.py --config configs/quickstart.yaml --output_dir runs/quickstart
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml scripts/run_clm.py --config configs/quickstart.yaml

The YAML file holds the fields of ModelArguments, DataArguments and RunArguments (hf_multipole/training/arguments.py) and of
Transformers' TrainingArguments; each of them can be overridden on the command line.
"""

from hf_multipole.training.run import run

if __name__ == "__main__":
    run("run_clm.py", masked=False)

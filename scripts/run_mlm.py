"""Trains a masked language model: the same as `hf-multipole train-mlm`, which has the options (--help)."""

from hf_multipole.commands.__main__ import main

if __name__ == "__main__":
    main("train-mlm")

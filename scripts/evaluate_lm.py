"""Measures a language model on a text: the same as `hf-multipole evaluate`, which has the options (--help)."""

from hf_multipole.commands.__main__ import main

if __name__ == "__main__":
    main("evaluate")

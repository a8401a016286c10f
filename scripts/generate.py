"""Continues a prompt: the same as `hf-multipole generate`, which has the options (--help)."""

from hf_multipole.commands.__main__ import main

if __name__ == "__main__":
    main("generate")

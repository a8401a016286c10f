"""Gives a checkpoint of a stock architecture another attention: the same as `hf-multipole convert`, which has the options (--help)."""

from hf_multipole.commands.__main__ import main

if __name__ == "__main__":
    main("convert")

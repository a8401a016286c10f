"""The command lines: ``hf-multipole train-clm ...``, ``python -m hf_multipole.commands train-clm ...``, and the scripts over them.

A process that is one of them imports ``parsers`` and ``startup`` before torch, so that help and wrong options are answered at once.
"""

"""Trains a causal language model."""

import argparse

from ..training.run import run as train


def run(options: argparse.Namespace) -> None:
    train(options.program, options.arguments, masked=False)

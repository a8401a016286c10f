"""The arguments of the training scripts: a YAML file, with overrides from the command line."""

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..modeling.configuration_multipole import MultipoleConfig


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint to start from; a new model by default"})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "fields of MultipoleConfig for a new model, a YAML mapping such as '{hidden_size: 128}'"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer folder or Hub name; byte-level ByT5 by default"})

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            self.config_overrides = yaml.safe_load(self.config_overrides)
        self.config_overrides = self.config_overrides or {}
        if not isinstance(self.config_overrides, dict):
            raise ValueError(f"config_overrides must be a YAML mapping such as '{{hidden_size: 128}}', but is {self.config_overrides!r}")
        check_names(self.config_overrides, {f.name for f in dataclasses.fields(MultipoleConfig)}, "config_overrides")
        if self.model_name_or_path and self.config_overrides:
            raise ValueError("config_overrides describe a new model, but model_name_or_path names a checkpoint: give one of the two")


@dataclass
class DataArguments:
    """What it is trained on."""

    train_folder: str | None = field(
        default=None, metadata={"help": "folder of Python source text; the standard library of this interpreter by default"}
    )
    context_length: int = field(default=4096, metadata={"help": "tokens in a row"})
    eval_rows: int = field(default=16, metadata={"help": "held-out rows that the curve is measured on"})
    test_rows: int = field(default=64, metadata={"help": "held-out rows that the final figure is measured on"})

    def __post_init__(self):
        for name in ("context_length", "eval_rows", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive")


def check_names(given, known, where: str) -> None:
    """Raises ValueError for the first unknown name, with the nearest known one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ValueError(f"{where} has an unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def parse(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """``--config FILE.yaml`` and then ``--name value`` for single fields; the command line wins, mappings are merged."""
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(argv)
    values = {}
    if known.config:
        if not known.config.is_file():
            raise FileNotFoundError(f"--config {known.config} does not exist")
        values = yaml.safe_load(known.config.read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{known.config} must hold a mapping of names to values")
        check_names(values, {f.name for kind in kinds for f in dataclasses.fields(kind) if f.init}, str(known.config))
    parser = HfArgumentParser(kinds)
    if not {"-h", "--help"} & set(rest):
        # Only what the command line says overrides the file, not the parser's defaults.
        probe = HfArgumentParser(kinds, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        for action in probe._actions:
            action.default, action.required = argparse.SUPPRESS, False
        given, unknown = probe.parse_known_args(rest)
        check_names(
            [name.lstrip("-") for name in unknown if name.startswith("--")],
            {f.name for kind in kinds for f in dataclasses.fields(kind) if f.init},
            "the command line",
        )
        given = vars(given)
        if "config_overrides" in given:
            given["config_overrides"] = (
                values.get("config_overrides", {}) | ModelArguments(config_overrides=given["config_overrides"]).config_overrides
            )
        values |= given
        return parser.parse_dict(values)
    return parser.parse_args_into_dataclasses(rest)

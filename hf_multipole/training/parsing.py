"""A run's arguments from a YAML file and the command line."""

import dataclasses
import os
import re
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments, check_names, mapping

KINDS = (ModelArguments, DataArguments, RunArguments, TrainingArguments)
MASKED_KINDS = (*KINDS, MaskingArguments)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        # An option has its name with hyphens, too.
        raise ValueError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))


def read_yaml(path: Path, names) -> dict:
    """The mapping in a configuration file, its names checked."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values")
    check_names(values, names, str(path))
    return values


def check_launch(use_cpu: bool = False) -> None:
    """Raises ValueError where a launcher started this process for a GPU, and there is none: the processes would not find each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    on_cpu = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if launched and not on_cpu and not getattr(torch, "accelerator", torch.cuda).is_available():
        raise ValueError(f"this was launched on GPUs, but torch {torch.__version__} finds none: launch with configs/accelerate/cpu.yaml")


def parse(argv: list[str] | None = None, kinds: tuple[type, ...] = KINDS, name: str = "run"):
    """``--config FILE.yaml`` and then ``--name value`` for single fields; the command line wins, mappings are merged.

    name: of the folder under runs/ where neither says an output_dir; that of the file by default.
    Returns one object for each of ``kinds``. Raises ValueError and OSError, with one line each, for what cannot be used.
    """
    parser = _Parser(kinds, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML file with any of the names below")
    parser.add_argument("--help-all", action="help", help="shows this")
    names = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    file = parser.parse_known_args(argv)[0].config
    values = read_yaml(file, names) if file else {}
    # Defaults that are text, such as 1e-3 without a point, are read as they would be from the command line.
    parser.set_defaults(**values)
    namespace, unknown = parser.parse_known_args(argv)
    check_names([part.lstrip("-").partition("=")[0] for part in unknown if part.startswith("--")], names, "the command line")
    if unknown:
        raise ValueError(f"the command line has {unknown[0]!r}, which belongs to no option")
    given = {name: value for name, value in vars(namespace).items() if name in names}
    for field, example in (("config_overrides", "{hidden_size: 128}"), ("convert", "{kind: multipole, block_size: 64}")):
        if field in names:
            given[field] = mapping(values.get(field), field, example) | mapping(given[field], field, example)
    if "output_dir" in names and given["output_dir"] is None:
        given["output_dir"] = f"runs/{file.stem if file else name}"
    if TrainingArguments in kinds:
        check_launch(given["use_cpu"])
    parsed = parser.parse_dict(given)
    for arguments in parsed:
        if isinstance(arguments, TrainingArguments) and arguments.hub_token:
            # Trainer writes its arguments beside the weights. huggingface_hub finds the token here.
            os.environ["HF_TOKEN"], arguments.hub_token = arguments.hub_token, None
    return parsed

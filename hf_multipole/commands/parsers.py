"""The options of every command. Free of torch and of Transformers, so that --help is answered at once."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType

from ..modeling.options import add_arguments, default_of, fields_of, nearest
from ..training.arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments

# Kinds of attention that ``convert`` gives: those of integration/conversion.py, which takes long to import.
KINDS = ("multipole", "multipole_linear", "tensor")
# The fields of Transformers' TrainingArguments that most runs set, with the defaults of Transformers 5.23; None where the words tell it.
TRAINER_OPTIONS = {
    "output_dir": (None, "folder of the run; by default runs/ and the name of the configuration file, or of the command"),
    "resume_from_checkpoint": (
        None,
        "goes on with an interrupted run. true: from the newest complete checkpoint in output_dir, and where a file of it is damaged, one "
        "line says so. intact: from the newest one whose files are what was written, passing over damaged ones. Or a checkpoint's folder. "
        "A new run by default",
    ),
    "max_steps": (-1, "steps of training; -1: as many as num_train_epochs have"),
    "num_train_epochs": (3.0, "passes over the training text"),
    "per_device_train_batch_size": (8, "rows of a step on each device"),
    "gradient_accumulation_steps": (1, "batches whose gradients make a step"),
    "learning_rate": (5e-5, "at its highest"),
    "lr_scheduler_type": ("linear", "how the learning rate falls: linear, cosine, constant_with_warmup, ..."),
    "warmup_steps": (0, "steps in which the learning rate rises; below 1 a share of all"),
    "weight_decay": (0.0, "of AdamW"),
    "max_grad_norm": (1.0, "gradients longer than this are shortened to it"),
    "bf16": (False, "mixed precision"),
    "gradient_checkpointing": (False, "less memory, more time"),
    "use_cpu": (False, "leaves a GPU alone"),
    "eval_strategy": ("no", "no, steps or epoch"),
    "eval_steps": (None, "steps between evaluations; those of logging_steps by default"),
    "save_strategy": ("steps", "no, steps or epoch"),
    "save_steps": (500, "steps between checkpoints"),
    "save_total_limit": (None, "checkpoints that are kept; all by default"),
    "logging_steps": (500, "steps between lines of the log"),
    "seed": (42, "of weights, order and dropout"),
    "report_to": ("none", "trackers: tensorboard, wandb, ..."),
    "push_to_hub": (False, "uploads the model at the end, or with hub_strategy every_save each checkpoint"),
    "hub_model_id": (None, "where to; the name of output_dir by default"),
}


def _add(to, name: str, words: str, default=None, **more) -> None:
    """An option whose help shows its default."""
    shown = "" if default in (None, False) or default == [] else f" (default: {default})"
    to.add_argument(name, default=default, help=words.replace("%", "%%") + shown, **more)


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


# Training


def _training(program: str, masked: bool) -> argparse.ArgumentParser:
    """For its help alone: what is given is read by training/arguments.py, which takes the names of a YAML file, too."""
    kind, task = ("mlm", "masked") if masked else ("clm", "causal")
    parser = _parser(
        program,
        f"""Trains a {task} language model with Transformers' Trainer.

    hf-multipole train-{kind} --config configs/{"wikitext-103-masked" if masked else "quickstart"}.yaml --max_steps 100
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m hf_multipole.commands train-{kind} \\
        --config configs/{"wikitext-103-masked" if masked else "wikitext-103-causal"}.yaml

The YAML file holds any of the names below; the command line wins over it, and mappings are merged. Everything that can be refused is
refused before the first step. A run leaves in its folder the weights with their code, figures.json, plots and a model card.""",
    )
    parser.usage = f"{program} [--config FILE.yaml] [--NAME VALUE ...]"
    parser.add_argument("--config", metavar="FILE.yaml", help="configuration of the run")
    parser.add_argument("--help-all", action="store_true", help="all options, those of TrainingArguments too, in their libraries' words")
    for kind in (ModelArguments, DataArguments, RunArguments, *((MaskingArguments,) if masked else ())):
        group = parser.add_argument_group(kind.__name__, kind.__doc__)
        for field in dataclasses.fields(kind):
            # The words are HfArgumentParser's, with their percent signs doubled.
            words = field.metadata["help"].replace("%%", "%")
            _add(group, f"--{field.name}", words, field.default, metavar=_metavar(field.type))
    group = parser.add_argument_group("TrainingArguments", "Of Transformers' own, which are options all, the most used ones:")
    for name, (default, words) in TRAINER_OPTIONS.items():
        _add(group, f"--{name}", words, default, metavar="X")
    return parser


def _metavar(kind) -> str:
    kinds = [part for part in typing.get_args(kind) if part is not NoneType] or [kind]
    if dict in kinds:
        return "YAML"
    return {bool: "BOOL", int: "N", float: "X"}.get(kinds[0], "TEXT")


# The others


def _evaluate(program: str) -> argparse.ArgumentParser:
    parser = _parser(
        program,
        """Measures a causal or masked checkpoint of Transformers on a text, at several context lengths, on one process or many.

    hf-multipole evaluate --model runs/quickstart --folder stdlib --context-lengths 512 1024 4096 --output runs/evaluation
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m hf_multipole.commands evaluate --model gpt2 \\
        --dataset-name Salesforce/wikitext --dataset-config-name wikitext-103-raw-v1 --split test --lines \\
        --context-lengths 1024 --stride 256 --output runs/gpt2

Writes evaluation.json, the loss by position as a plot and, with --probes, how far back the model reaches as a heat map.""",
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub name")
    parser.add_argument("--tokenizer", help="the checkpoint's own by default")
    parser.add_argument("--attn-implementation", help="multipole, sdpa, eager; the model's own by default")
    _add(parser, "--dtype", "of the parameters; auto is the checkpoint's", "auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset-name", help="dataset on the Hub, or a folder that load_dataset reads")
    source.add_argument("--file", nargs="+", help="text, JSON, CSV or Parquet files")
    source.add_argument("--folder", help="Python source text, or stdlib: the files that training with --train_folder holds out")
    parser.add_argument("--dataset-config-name", help="configuration of the dataset")
    parser.add_argument("--split", help="test for a dataset, all of the files")
    _add(parser, "--text-column", "column or field that holds the text", "text")
    parser.add_argument("--lines", action="store_true", help="rows are pieces of one text, not documents")
    parser.add_argument("--document-boundaries", action="store_true", help="no attention across documents")
    parser.add_argument("--context-lengths", type=int, nargs="+", required=True, metavar="N", help="tokens of the rows to measure")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="sliding windows that begin so many tokens apart; separate chunks by default"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="as many tokens from the start; all by default")
    _add(parser, "--batch-size", "rows of a batch", 4, type=int, metavar="N")
    _add(parser, "--mlm-probability", "share of the tokens that a masked model is asked for", 0.15, type=float, metavar="X")
    _add(parser, "--probes", "how far back the model reaches: needle, copy or both", [], nargs="*", choices=["needle", "copy"])
    _add(parser, "--cases", "rows that a probe tries at each distance", 32, type=int, metavar="N")
    _add(parser, "--seed", "of masks and probes", 0, type=int, metavar="N")
    parser.add_argument("--output", type=Path, required=True, help="folder for evaluation.json and the plots")
    return parser


def _generate(program: str) -> argparse.ArgumentParser:
    parser = _parser(
        program,
        """Continues a prompt with a causal checkpoint; the text is printed as it is made.

    hf-multipole generate --model runs/quickstart --prompt "def main():" --max-new-tokens 200

A long document can be read once and asked many times; of a multipole layer its state takes one or two megabytes, whatever its length:

    hf-multipole generate --model runs/quickstart --prompt-file README.md --max-new-tokens 0 --save-state runs/readme.state
    hf-multipole generate --model runs/quickstart --load-state runs/readme.state --prompt "A question about it"
""",
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub name")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    _add(parser, "--max-new-tokens", "most tokens to write", 200, type=_number(int, 0), metavar="N")
    _add(parser, "--temperature", "0 for greedy decoding", 0.8, type=_number(float, 0), metavar="X")
    _add(parser, "--top-p", "samples from the likeliest tokens that together have this probability", 0.95, type=float, metavar="X")
    _add(parser, "--seed", "of the samples", 0, type=int, metavar="N")
    _add(parser, "--chunk", "tokens of the prompt that are read at once", 8192, type=_number(int, 1), metavar="N")
    parser.add_argument("--load-state", type=Path, help="state of a text that was read before; the prompt goes on from there")
    parser.add_argument("--save-state", type=Path, help="file for the state after the prompt")
    return parser


def _number(kind: type, least: int) -> Callable:
    """A number of at least so much, as argparse reads it."""

    def read(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"is {text}, but must be at least {least}")
        return value

    read.__name__ = kind.__name__  # for argparse's own message
    return read


def _convert(program: str) -> argparse.ArgumentParser:
    parser = _parser(
        program,
        """Converts a checkpoint of a stock architecture to multipole attention with learned summaries, and reports what it costs untrained;
or adds tensor branches to its attention, which cost it nothing.

    hf-multipole convert --model runs/llama --text README.md --output runs/llama-multipole --block-size 64 --rank 4
    hf-multipole convert --model runs/llama --kind tensor --tensor-window 32 512 --output runs/llama-tensor

The report has the error of each layer's attention output against exact attention on the text, the loss with that layer alone
converted, and a suggestion of layers to leave exact, which --layers then chooses. With tensor branches the model computes what it
did, so that there is nothing to measure.""",
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub name")
    parser.add_argument("--output", type=Path, required=True, help="folder of the converted checkpoint; a new one")
    _add(parser, "--kind", "of attention", "multipole", choices=KINDS)
    parser.add_argument("--text", type=Path, help="text that the errors of multipole attention are measured on; needed for it")
    _add(
        parser, "--tokens", "how many tokens of it, in one row; no more than the model's positions", 4096, type=_number(int, 1), metavar="N"
    )
    _add(parser, "--tolerance", "error over which the report suggests to leave a layer exact", 0.3, type=float, metavar="X")
    add_arguments(parser)
    return parser


def _check_convert(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.kind == "tensor" and options.text is not None:
        parser.error("--text belongs to multipole attention: tensor branches change nothing at first, so that there is nothing to measure")
    if options.kind != "tensor" and options.text is None:
        parser.error(f"--kind {options.kind} needs --text, which its errors are measured on")
    for name, field in fields_of("convert").items():
        # They are measured, too.
        if options.kind != "tensor" and name in ("block_size", "rank") and getattr(options, name) is None:
            setattr(options, name, default_of(field, "convert"))


# All


# Of each command, what it does; its module has the same name.
COMMANDS = {
    "train-clm": "trains a causal language model",
    "train-mlm": "trains a masked language model",
    "evaluate": "measures a causal or masked model on a text, at several context lengths",
    "generate": "continues a prompt; reads a long text once, to be asked many times",
    "convert": "gives a checkpoint of a stock architecture another attention",
}


def read(command: str | None) -> tuple[str, argparse.Namespace]:
    """The module of a command, and its options, from this process' command line; they have the program's name as ``program``.

    command: None where the first argument names it.
    Ends the process after --help, and with one line where the command line cannot be read.
    """
    program, *arguments = sys.argv
    program = Path(program).name
    if command is None:
        program = "hf-multipole"
        if not arguments or arguments[0] in ("-h", "--help"):
            _overview().print_help()
            raise SystemExit(0 if arguments else 2)
        command, *arguments = arguments
        if command not in COMMANDS:
            raise SystemExit(f"{program}: there is no command {command!r}{nearest(command, COMMANDS)}; --help names them")
        program = f"{program} {command}"
    module = command.replace("-", "_")
    if command in ("train-clm", "train-mlm"):
        if {"-h", "--help"} & set(arguments):
            _training(program, command == "train-mlm").print_help()
            raise SystemExit
        return module, argparse.Namespace(program=program, arguments=arguments)
    parser = {"evaluate": _evaluate, "generate": _generate, "convert": _convert}[command](program)
    options = parser.parse_args(arguments)
    if command == "convert":
        _check_convert(parser, options)
    options.program = program
    return module, options


def _overview() -> argparse.ArgumentParser:
    lines = "\n".join(f"    {name:<12}{words}" for name, words in COMMANDS.items())
    words = f"Fast multipole attention and tensor attention for Transformers.\n\n{lines}\n\nhf-multipole COMMAND --help has its options."
    parser = _parser("hf-multipole", words)
    parser.usage = "hf-multipole COMMAND [OPTIONS]"
    return parser

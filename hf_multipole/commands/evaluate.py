"""Measures a causal or masked checkpoint on a text, at several context lengths, on one process or many."""

import argparse
import sys
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from ..training.arguments import DataArguments
from ..training.batches import MaskingCollator, collate
from ..training.cards import command
from ..training.checkpoints import write_json
from ..training.data import load_texts, pack
from ..training.errors import load, told_in_a_line
from ..training.evaluation import measure, probe, probe_sizes, windows
from ..training.figures import plot_positions, plot_reach
from ..training.models import keeps_documents_apart
from ..training.parsing import check_launch


def prepare(args: argparse.Namespace):
    """Accelerator, model, tokenizer and rows by context length; raises before any work is done."""
    if (args.output / "evaluation.json").exists():
        raise ValueError(f"{args.output} holds another evaluation: give another --output")
    for name in ("stride", "max_tokens", "batch_size", "cases"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be positive")
    if args.folder and args.split:
        raise ValueError("--folder has no --split: it is the files that training holds out")
    if min(args.context_lengths) < 2 or (args.stride or 1) > min(args.context_lengths):
        raise ValueError("--context-lengths must be at least 2, and at least the --stride")
    for kind in args.probes:
        probe_sizes(kind, min(args.context_lengths))
    data = DataArguments(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_file=args.file,
        train_folder=args.folder,
        train_split_name=args.split or ("test" if args.dataset_name else "train"),
        text_column=args.text_column,
        rows_are_documents=not args.lines,
        document_boundaries=args.document_boundaries,
    )
    check_launch()
    accelerator = Accelerator()
    options = {"trust_remote_code": args.trust_remote_code}
    config = load("checkpoint", args.model, AutoConfig.from_pretrained, **options)
    causal = not any("MaskedLM" in name for name in config.architectures or ())
    if not causal and (args.stride or args.probes):
        raise ValueError("--stride and --probes are for causal models, but this one is masked")
    if args.stride and args.document_boundaries:
        raise ValueError("--stride takes the text for one: leave out --document-boundaries")
    tokenizer = load("tokenizer", args.tokenizer or args.model, AutoTokenizer.from_pretrained, **options)
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    auto_class = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = load("checkpoint", args.model, auto_class.from_pretrained, dtype=dtype, **options).eval()
    if args.document_boundaries and not keeps_documents_apart(model):
        raise ValueError(f"{type(model).__name__} does not keep documents apart: leave out --document-boundaries")
    texts, held_out = load_texts(data)
    texts = held_out if args.folder else texts
    packing = {"boundaries": args.document_boundaries, "end_of_text": not args.lines}
    rows = {n: pack(tokenizer, texts, n, args.max_tokens and max(1, args.max_tokens // n), **packing) for n in args.context_lengths}
    collator = collate if causal else MaskingCollator(tokenizer, args.mlm_probability, args.seed)
    return accelerator, accelerator.prepare_model(model, evaluation_mode=True), causal, collator, rows


def run(args: argparse.Namespace) -> None:
    with told_in_a_line(args.program):
        accelerator, model, causal, collator, rows = prepare(args)
    results: dict = {}
    probes: dict = {kind: {} for kind in args.probes}
    for length, part in rows.items():
        scored = windows(part, length, args.stride) if args.stride else part
        results[str(length)] = measure(model, scored, collator, accelerator, args.batch_size, causal, f"context {length}")
        for kind in probes:
            probes[kind][str(length)] = probe(model, part, accelerator, kind, args.cases, args.batch_size, args.seed)
    if accelerator.is_main_process:
        write(args, causal, results, probes)
    # Nobody leaves while another one still needs the connection.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def write(args, causal: bool, results: dict, probes: dict) -> None:
    """evaluation.json, the plots, and a line for each context length."""
    args.output.mkdir(parents=True, exist_ok=True)
    record = {"command": command(sys.argv), "causal": causal, "contexts": results, "probes": probes}
    write_json(args.output / "evaluation.json", record)
    if find_spec("matplotlib"):
        plot_positions({f"context {length}": result for length, result in results.items()}, args.output / "loss_by_position.png")
        if probes:
            plot_reach(probes, args.output / "reach.png")
    else:
        print("no plots were drawn: install hf_multipole[plot] for them")
    for length, result in results.items():
        print(f"context {length}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float)))

"""Measures a causal or masked checkpoint of Transformers on a text, at several context lengths, on one process or many.

    python scripts/evaluate_lm.py --model runs/quickstart --file text.txt --context-lengths 512 1024 4096 --output runs/evaluation
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml scripts/evaluate_lm.py --model gpt2 \
        --dataset-name Salesforce/wikitext --dataset-config-name wikitext-103-raw-v1 --split test --lines --stride 256 ...

Writes evaluation.json, the loss by position as a plot and, with --probes, how far back the model reaches as a heat map.
"""

import argparse
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import hf_multipole  # noqa: F401 (registers the multipole models)
from hf_multipole.training.arguments import DataArguments
from hf_multipole.training.batches import MaskingCollator, collate
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.data import load_texts, pack
from hf_multipole.training.evaluation import measure, probe, probe_sizes, windows
from hf_multipole.training.figures import plot_positions, plot_reach
from hf_multipole.training.models import keeps_documents_apart
from hf_multipole.training.run import BAD_INPUT, fail


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub name")
    parser.add_argument("--tokenizer", help="the checkpoint's own by default")
    parser.add_argument("--attn-implementation", help="multipole, sdpa, eager; the model's own by default")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset-name")
    source.add_argument("--file", nargs="+", help="text, JSON, CSV or Parquet files")
    source.add_argument("--folder", help="Python source text, or stdlib: the files that training with --train_folder holds out")
    parser.add_argument("--dataset-config-name")
    parser.add_argument("--split", help="test for a dataset, all of the files")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--lines", action="store_true", help="rows are pieces of one text, not documents")
    parser.add_argument("--document-boundaries", action="store_true", help="no attention across documents")
    parser.add_argument("--context-lengths", type=int, nargs="+", required=True)
    parser.add_argument("--stride", type=int, help="sliding windows that begin so many tokens apart; separate chunks by default")
    parser.add_argument("--max-tokens", type=int, help="as many tokens from the start; all by default")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--mlm-probability", type=float, default=0.15)
    parser.add_argument("--probes", nargs="*", choices=["needle", "copy"], default=[], help="how far back the model reaches")
    parser.add_argument("--cases", type=int, default=32, help="rows that a probe tries at each distance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder for evaluation.json and the plots")
    return parser.parse_args()


def prepare(args):
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
    accelerator = Accelerator()
    options = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model, **options)
    except OSError as error:
        raise OSError(f"there is no checkpoint {args.model}: {error}") from error
    causal = not any("MaskedLM" in name for name in config.architectures or ())
    if not causal and (args.stride or args.probes):
        raise ValueError("--stride and --probes are for causal models, but this one is masked")
    if args.stride and args.document_boundaries:
        raise ValueError("--stride takes the text for one: leave out --document-boundaries")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, **options)
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(args.model, dtype=dtype, **options).eval()
    if args.document_boundaries and not keeps_documents_apart(model):
        raise ValueError(f"{type(model).__name__} does not keep documents apart: leave out --document-boundaries")
    texts, held_out = load_texts(data)
    texts = held_out if args.folder else texts
    packing = {"boundaries": args.document_boundaries, "end_of_text": not args.lines}
    rows = {n: pack(tokenizer, texts, n, args.max_tokens and max(1, args.max_tokens // n), **packing) for n in args.context_lengths}
    collator = collate if causal else MaskingCollator(tokenizer, args.mlm_probability, args.seed)
    return accelerator, accelerator.prepare_model(model, evaluation_mode=True), causal, collator, rows


def main() -> None:
    args = parse()
    try:
        accelerator, model, causal, collator, rows = prepare(args)
    except BAD_INPUT as error:
        fail("evaluate_lm.py", error)
    results, probes = {}, {kind: {} for kind in args.probes}
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
    record = {"command": "python " + shlex.join(sys.argv), "causal": causal, "contexts": results, "probes": probes}
    write_json(args.output / "evaluation.json", record)
    if find_spec("matplotlib"):
        plot_positions({f"context {length}": result for length, result in results.items()}, args.output / "loss_by_position.png")
        if probes:
            plot_reach(probes, args.output / "reach.png")
    else:
        print("no plots were drawn: install hf_multipole[plot] for them")
    for length, result in results.items():
        print(f"context {length}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float)))


if __name__ == "__main__":
    main()

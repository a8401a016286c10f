"""One training run: what the commands train-clm and train-mlm share."""

import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import HubStrategy, IntervalStrategy

from ..modeling.configuration_multipole import MULTIPOLE_LAYERS, MultipoleConfig
from ..modeling.multipole_cache import STATE_IMPLEMENTATIONS
from . import checkpoints
from .arguments import DataArguments, RunArguments
from .batches import MaskingCollator, collate
from .cards import command, write_card
from .data import Texts, first_files, hold_out, load_texts, pack, recut, stream
from .errors import one_line, told_in_a_line
from .figures import plot_attention, plot_curves, plot_scaling
from .hub import push
from .metrics import compression_baselines
from .models import build_model, build_tokenizer, check_model, keeps_documents_apart
from .parsing import KINDS, MASKED_KINDS, parse
from .report import curve, measure_scaling
from .trainer import CheckpointError, LanguageModelTrainer


def run(program: str, line: list[str], masked: bool) -> None:
    """The whole of a training command: arguments from a command line, training, figures, model card, upload.

    program: its name in messages.
    """
    with told_in_a_line(program):
        trainer, given = prepare(line, masked)
    try:
        _train(program, trainer, given)
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(f"\n{program}: {interrupted(trainer)}", file=sys.stderr)
        sys.exit(130)  # what a shell says of a process that was interrupted


def _train(program: str, trainer: LanguageModelTrainer, given: dict) -> None:
    if trainer.is_world_process_zero():
        print(beginning(trainer, given["data_args"]))
        if given["checkpoint"]:
            print(f"it goes on from {given['checkpoint']}")
    try:
        trainer.train(resume_from_checkpoint=given["checkpoint"])
    except (CheckpointError, ImportError) as error:
        # It may concern one process alone, whichever; or an optimizer's package is not installed.
        sys.exit(f"{program}: {one_line(error)}")
    metrics = trainer.evaluate(given["held_out"], metric_key_prefix="test")
    # Trainer turns it off, for training.
    trainer.accelerator.unwrap_model(trainer.model).config.use_cache = given["use_cache"]
    trainer.save_final()
    if trainer.is_world_process_zero():
        print(report(trainer, given, metrics))
        if trainer.args.push_to_hub:
            try:
                print(push(Path(trainer.args.output_dir), trainer.args, "End of training", trainer.run_args.hub_retries))
            except OSError as error:
                sys.exit(f"{program}: {one_line(error)}; the trained model is in {trainer.args.output_dir}")
    # Nobody leaves while another one still needs the connection.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def beginning(trainer: LanguageModelTrainer, data_args: DataArguments) -> str:
    """What runs, in a line."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    where = counted(torch.get_num_threads(), "thread") + " of the CPU" if args.device.type == "cpu" else str(args.device)
    where = where if args.world_size == 1 else f"{args.world_size} processes, this one on {where}"
    rows = counted(args.train_batch_size * args.world_size * args.gradient_accumulation_steps, "row")
    length = counted(args.max_steps, "step") if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return (
        f"{args.output_dir}: {type(model).__name__} of {model.num_parameters():,} parameters on {where}; {length} of {rows} of "
        f"{data_args.context_length:,} tokens, from {described(data_args)}"
    )


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def described(data_args: DataArguments) -> str:
    """The training text, in words."""
    if data_args.train_folder:
        return "the source text of Python's standard library" if data_args.train_folder == "stdlib" else data_args.train_folder
    return " ".join(filter(None, [data_args.dataset_name, data_args.dataset_config_name])) or ", ".join(data_args.train_file)


def interrupted(trainer: LanguageModelTrainer) -> str:
    """How to go on with a run that was interrupted."""
    last = next(iter(checkpoints.complete(Path(trainer.args.output_dir))), None)
    how = f"go on from {last} by the same command with --resume_from_checkpoint true"
    if last is None:
        how = "it has no checkpoint yet, so that the same command starts it anew"
    return f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}; {how}"


def prepare(line: list[str], masked: bool):
    """The trainer, and what the report needs. Everything that can be refused is refused here, before a step is taken or a file
    is written.
    """
    model_args, data_args, run_args, args, *masking = parse(line, MASKED_KINDS if masked else KINDS, "masked" if masked else "causal")
    check(data_args, run_args, args)
    # Memory is pinned for a GPU; without one torch would warn.
    args.dataloader_pin_memory &= args.device.type != "cpu"
    folder = Path(args.output_dir)
    parts = [model_args, data_args, *masking]
    identity = {name: value for part in parts for name, value in dataclasses.asdict(part).items()} | {"seed": args.seed, "masked": masked}
    identity |= {name: getattr(run_args, name) for name in ("length_warmup_steps", "length_warmup_start")}
    main = os.environ.get("RANK", "0") == "0"
    checkpoint = checkpoints.choose(folder, args.resume_from_checkpoint, print if main else lambda line: None)
    resuming = checkpoints.resumes(args.resume_from_checkpoint) and (checkpoint is None or checkpoint.parent.resolve() == folder.resolve())
    checkpoints.claim(folder, identity, resuming)

    texts = load_texts(data_args)
    if texts[1] is None and data_args.streaming:
        raise ValueError("streaming needs held-out text of its own: give validation_split_name or validation_file")
    set_seed(args.seed)
    tokenizer = build_tokenizer(model_args, texts[0], masked)
    model = build_model(model_args, tokenizer, data_args.context_length, masked)
    check_model(model, tokenizer, max([data_args.context_length, *(data_args.eval_context_lengths or ())]), masked)
    if data_args.document_boundaries and not keeps_documents_apart(model):
        raise ValueError(f"{type(model).__name__} does not keep the documents of a row apart: set document_boundaries to false")
    train, held_out, held_out_texts = build_rows(*texts, data_args, args, tokenizer)
    curve_rows = held_out.select(range(min(data_args.eval_rows, len(held_out))))
    lengths = {length: recut(curve_rows, length) for length in data_args.eval_context_lengths or ()}

    callbacks = []
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run_args.early_stopping_patience))
        # Its patience is part of the run, and goes on with it.
        args.restore_callback_states_from_checkpoint = True
    collators = [MaskingCollator(tokenizer, masking[0].mlm_probability, args.seed) for _ in range(2)] if masked else [collate, collate]
    use_cache = getattr(model.config, "use_cache", False)
    try:
        trainer = LanguageModelTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=curve_rows,
            processing_class=tokenizer,
            data_collator=collators[0],
            eval_collator=collators[1],
            eval_lengths=lengths,
            callbacks=callbacks,
            run_args=run_args,
            context_length=data_args.context_length,
            causal=not masked,
        )
    except RuntimeError as error:
        # A tracker that is not installed, or a device without room for the model.
        raise ValueError(str(error)) from error
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(folder / checkpoints.RUN, identity)
    given = {"checkpoint": None if checkpoint is None else str(checkpoint), "held_out": held_out, "held_out_texts": held_out_texts}
    return trainer, given | {"data_args": data_args, "use_cache": use_cache}


def check(data_args: DataArguments, run_args: RunArguments, args: TrainingArguments) -> None:
    """What concerns several kinds of arguments at once. Raises ValueError."""
    full, start = data_args.context_length, run_args.length_warmup_start
    if run_args.length_warmup_steps and (start > full or full % start or (full // start).bit_count() != 1):
        raise ValueError(f"length_warmup_start is {start}, but must be context_length {full} halved some times")
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("streaming has no end that is known beforehand: give max_steps")
    if run_args.early_stopping_patience is not None:
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError("early_stopping_patience needs evaluations: give eval_strategy steps or epoch")
        if args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
    if args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(f"hub_strategy {args.hub_strategy.value} would upload pickled states: give end or every_save")
    if data_args.document_boundaries and args.use_cache:
        raise ValueError("document_boundaries need use_cache: false, for a cache hides where documents start")
    for name, only in (("prediction_loss_only", False), ("batch_eval_metrics", False), ("eval_do_concat_batches", True)):
        if getattr(args, name) is not only:
            raise ValueError(f"{name} must be {str(only).lower()}: the figures are made of all tokens' losses")
    if args.device.type == "cpu" and (args.fp16 or args.fp16_full_eval):
        raise ValueError("fp16 needs a GPU, and this run has none: give bf16 and use_cpu")
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file")


def build_rows(
    texts: Texts | Sequence[str], held_out_texts: Texts | Sequence[str] | None, data_args: DataArguments, args: TrainingArguments, tokenizer
) -> tuple[Dataset, Dataset, list[str]]:
    """Training rows, held-out rows, and the texts that these are of, where they are whole texts."""
    length, held_rows = data_args.context_length, data_args.eval_rows + data_args.test_rows
    options = {"boundaries": data_args.document_boundaries, "end_of_text": data_args.rows_are_documents}
    if held_out_texts is None:
        train, held_out = hold_out(pack(tokenizer, texts, length, **options), data_args.validation_split_percentage)
        return train, held_out.select(range(min(held_rows, len(held_out)))), []
    if data_args.streaming:
        train = stream(tokenizer, texts, length, **options)
    else:
        rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        train = pack(tokenizer, texts, length, rows if rows > 0 else None, **options)
    held_out = pack(tokenizer, held_out_texts, length, held_rows, **options)
    return train, held_out, first_files(held_out_texts, sum(held_out["bytes"]))


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on CUDA the most that tensors took, otherwise the most that this process did, with all its libraries; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(trainer: LanguageModelTrainer, given: dict, metrics: dict[str, float]) -> str:
    """Writes figures, plots and the model card beside the weights; returns the line that sums them up."""
    folder, causal, data_args, held_out = Path(trainer.args.output_dir), trainer.causal, given["data_args"], given["held_out"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    multipole = isinstance(model.config, MultipoleConfig)
    runs = model.config._attn_implementation in STATE_IMPLEMENTATIONS
    kinds = set(model.config.layer_types) if multipole else set()
    names = ("bits_per_byte", "perplexity", "token_accuracy") if causal else ("loss", "perplexity", "masked_accuracy")
    figures = {name: metrics[f"test_{name}"] for name in names}
    baselines = compression_baselines(given["held_out_texts"]) if causal and given["held_out_texts"] else {}
    points = curve(trainer.state.log_history, causal)
    record = {"parameters": model.num_parameters(), "metrics": figures, "curve": points, "by_position": trainer.loss_by_position}
    # A run that was interrupted after its last step has taken none.
    seconds = zip(*trainer.step_seconds) if trainer.step_seconds else ((), ())
    record["seconds_per_step"], record["cpu_seconds_per_step"] = (statistics.median(x) if x else None for x in seconds)
    record["peak_memory"] = peak_memory(trainer.args.device)
    if causal:
        record["bits_per_byte"] = {"this model": figures["bits_per_byte"]} | baselines
    images = {}
    if find_spec("matplotlib"):
        if points:
            images["loss curve"] = "loss_curve.png"
            unit = "bits per byte" if causal else "bits per masked token"
            plot_curves({"this model": points}, baselines, folder / "loss_curve.png", unit)
        # A sharded model runs on all processes or not at all.
        whole = not trainer.is_fsdp_enabled
        if whole and kinds & set(MULTIPOLE_LAYERS) and runs:
            # Tensor layers weigh tuples of tokens, and linear ones share weights: no picture.
            if kinds <= {"multipole_attention", "full_attention"}:
                images["attention pattern"] = "attention.png"
                sample = torch.tensor([held_out[0]["input_ids"][:512]], device=trainer.args.device)
                plot_attention(model.eval(), sample, folder / "attention.png")
            images["time against context length"] = "scaling.png"
            record["scaling"] = measure_scaling(model, data_args.context_length)
            plot_scaling(record["scaling"], folder / "scaling.png")
    else:
        print("no plots were drawn: install hf_multipole[plot] for them")
    checkpoints.write_json(folder / "figures.json", record)
    card = {
        "title": folder.name,
        "causal": causal,
        "multipole": runs and (not multipole or bool(kinds & set(MULTIPOLE_LAYERS))),
        "code": multipole,
        "data": described(data_args),
        "dataset": data_args.dataset_name if data_args.dataset_name and not Path(data_args.dataset_name).exists() else None,
        "configuration": {"parameters": f"{model.num_parameters():,}", "context length": data_args.context_length}
        | {name: value for name, value in model.config.to_diff_dict().items() if isinstance(value, int | float | str | bool)}
        | (getattr(model.config, "multipole", None) or {})
        | {
            "steps": trainer.state.global_step,
            "rows a step": trainer.args.train_batch_size * trainer.args.world_size * trainer.args.gradient_accumulation_steps,
            "learning rate": trainer.args.learning_rate,
            "seed": trainer.args.seed,
        },
        "command": command(sys.argv),
        "metrics": figures,
        "baselines": baselines,
        "curve": points,
        "images": images,
    }
    write_card(folder / "README.md", card)
    if not causal:
        line = f"masked accuracy {figures['masked_accuracy']:.3f}, loss {figures['loss']:.3f} on held-out text"
    else:
        others = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items())
        line = f"{figures['bits_per_byte']:.3f} bits per byte on held-out files" + (f" ({others})" if others else "")
    return f"{folder}: {line}; the card is {folder / 'README.md'}, the figures are {folder / 'figures.json'}"

"""Trains a causal language model with Trainer.

    python scripts/run_clm.py --config configs/quickstart.yaml --output_dir runs/quickstart
    accelerate launch scripts/run_clm.py --config configs/quickstart.yaml

The YAML file holds the fields of ModelArguments, DataArguments (hf_multipole/training/arguments.py) and of Transformers'
TrainingArguments; each of them can be overridden on the command line.
"""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, DataCollatorForLanguageModeling, Trainer, set_seed

from hf_multipole import MultipoleConfig, MultipoleForCausalLM
from hf_multipole.training.arguments import parse
from hf_multipole.training.data import first_files, pack, standard_library
from hf_multipole.training.metrics import bits_per_token, compression_baselines
from hf_multipole.training.report import EvaluationCurve, plot_attention, plot_curves, write_card, write_json


def prepare():
    """Arguments, tokenizer, data and model; its errors are one clear line, before any work is done."""
    model_args, data_args, training_args = parse()
    set_seed(training_args.seed)
    source = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source) if source else ByT5Tokenizer()
    if model_args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    else:
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": data_args.context_length}
        model = MultipoleForCausalLM(MultipoleConfig(**sizes | ids | model_args.config_overrides))

    training_texts, held_out_texts = standard_library(data_args.train_folder)
    held_out_rows = data_args.eval_rows + data_args.test_rows
    held_out_texts = first_files(held_out_texts, held_out_rows * data_args.context_length)
    rows = None
    if training_args.max_steps > 0:
        rows = training_args.max_steps * training_args.gradient_accumulation_steps
        rows *= training_args.train_batch_size * training_args.world_size
    with training_args.main_process_first(desc="packing"):
        train = pack(tokenizer, training_texts, data_args.context_length, rows)
        held_out = pack(tokenizer, held_out_texts, data_args.context_length, held_out_rows)
    return data_args, training_args, tokenizer, model, train, held_out, held_out_texts


def main() -> None:
    try:
        data_args, training_args, tokenizer, model, train, held_out, held_out_texts = prepare()
    except (ValueError, OSError, StrictDataclassError) as error:
        # A configuration's own error is the cause of the one that its class raises.
        sys.exit(f"run_clm.py: {error.__cause__ or error}")
    curve = EvaluationCurve()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out.select(range(min(data_args.eval_rows, len(held_out)))),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[curve],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    bits = bits_per_token(trainer.evaluate(held_out, metric_key_prefix="test")["test_loss"])
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    folder = Path(training_args.output_dir)
    baselines = compression_baselines(held_out_texts)
    figures = {"this model": bits} | baselines
    write_json(folder / "figures.json", {"bits_per_byte": figures, "parameters": model.num_parameters(), "curve": curve.points})
    images = {}
    if find_spec("matplotlib"):
        if curve.points:
            images["loss curve"] = "loss_curve.png"
            plot_curves({"this model": curve.points}, baselines, folder / "loss_curve.png")
        images["attention pattern"] = "attention.png"
        sample = torch.tensor([held_out[0]["input_ids"][:512]], device=trainer.model.device)
        plot_attention(trainer.model.eval(), sample, folder / "attention.png")
    else:
        print("no plots were drawn: install hf_multipole[plot] for them")
    write_card(folder, folder.name, figures, curve.points, "python " + shlex.join(sys.argv), images)
    print(f"{folder}: {bits:.3f} bits per byte on held-out files (" + ", ".join(f"{k} {v:.2f}" for k, v in baselines.items()) + ")")


if __name__ == "__main__":
    main()

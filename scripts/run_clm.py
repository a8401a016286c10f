"""Trains a causal language model with Trainer.

    python scripts/run_clm.py --config configs/quickstart.yaml --output_dir runs/quickstart
    accelerate launch scripts/run_clm.py --config configs/quickstart.yaml

The YAML file holds the fields of ModelArguments, DataArguments (hf_multipole/training/arguments.py) and of Transformers'
TrainingArguments; each of them can be overridden on the command line.
"""

import shlex
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, DataCollatorForLanguageModeling, Trainer, set_seed

from hf_multipole import MultipoleConfig, MultipoleForCausalLM
from hf_multipole.training.arguments import parse
from hf_multipole.training.data import pack, standard_library
from hf_multipole.training.metrics import bits_per_token, compression_baselines
from hf_multipole.training.report import EvaluationCurve, plot_attention, plot_curves, write_card, write_json


def main() -> None:
    try:
        model_args, data_args, training_args = parse()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"run_clm.py: {error}")
    set_seed(training_args.seed)
    source = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source) if source else ByT5Tokenizer()
    training_texts, held_out_texts = standard_library(data_args.train_folder)
    rows = None
    if training_args.max_steps > 0:
        rows = (
            training_args.max_steps * training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
        )
    with training_args.main_process_first(desc="packing"):
        train = pack(tokenizer, training_texts, data_args.context_length, rows)
        held_out = pack(tokenizer, held_out_texts, data_args.context_length, data_args.eval_rows + data_args.test_rows)
    evaluated = min(data_args.eval_rows, len(held_out))
    if model_args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    else:
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": data_args.context_length}
        model = MultipoleForCausalLM(MultipoleConfig(**sizes | ids | model_args.config_overrides))

    curve = EvaluationCurve()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out.select(range(evaluated)),
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
    figures = {"this model": bits} | compression_baselines(held_out_texts)
    write_json(folder / "figures.json", {"bits_per_byte": figures, "parameters": model.num_parameters(), "curve": curve.points})
    baselines = {name: value for name, value in figures.items() if name != "this model"}
    images = {}
    if curve.points:
        plot_curves({"this model": curve.points}, baselines, folder / "loss_curve.png")
        images["loss curve"] = "loss_curve.png"
    sample = trainer.model.get_input_embeddings().weight.new_tensor(held_out[0]["input_ids"][:512]).long()[None]
    plot_attention(trainer.model.eval(), sample, folder / "attention.png")
    images["attention pattern"] = "attention.png"
    command = "python " + shlex.join(sys.argv)
    write_card(folder, folder.name, figures, curve.points, command, images)
    print(f"{folder}: {bits:.3f} bits per byte on held-out files (" + ", ".join(f"{k} {v:.2f}" for k, v in baselines.items()) + ")")


if __name__ == "__main__":
    main()

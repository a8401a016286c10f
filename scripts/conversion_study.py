"""What a converted model is worth: a small Llama is trained with exact attention, converted, and trained on.

    python scripts/conversion_study.py --output runs/conversion

All arms start from the same exact checkpoint and take the same further steps over the same rows in the same order. Every run has a
folder of its own, and one that is complete is not run again.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_multipole.training.data import first_files, pack, standard_library
from hf_multipole.training.metrics import bits_per_token
from hf_multipole.training.report import write_json

CONTEXT, LONG = 1024, 4096
EVALUATED = 2**18  # held-out bytes that each figure is measured on
OPTIONS = {"block_size": 32, "rank": 4}
# name: how the exact checkpoint is converted, and what is trained then
ARMS = {
    "exact": (None, "all"),
    "multipole, all weights": (OPTIONS, "all"),
    "multipole, summaries only": (OPTIONS, "summaries"),
    "near field only, all weights": (OPTIONS | {"summary": "mean", "far_bias_init": -10000.0}, "all but the far bias"),
}


def new_model() -> LlamaForCausalLM:
    sizes = dict(vocab_size=384, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.1, attn_implementation="sdpa")
    )


def converted(folder: Path, options: dict | None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if options is not None:
        from hf_multipole import convert

        convert(model, "multipole", **options)
    return model


def choose_trained(model, what: str) -> None:
    for name, parameter in model.named_parameters():
        learned = ".multipole." in name
        parameter.requires_grad = {"all": True, "summaries": learned, "all but the far bias": not learned}[what]


@torch.no_grad()
def evaluate(model, held_out) -> dict[str, float]:
    """Bits per byte at the trained context and at four times that."""
    model.eval()
    out = {}
    for context in (CONTEXT, LONG):
        rows = held_out.reshape(-1, context)
        losses = [model(part, labels=part, use_cache=False).loss.item() for part in rows.split(LONG * 2 // context)]
        out[str(context)] = bits_per_token(sum(losses) / len(losses))
    return out


def train(model, rows, folder: Path, steps: int, rate: float, seed: int, device_batch: int) -> list[float]:
    """Trains with Trainer, from its last checkpoint where there is one; returns the training loss, in bits, over the steps."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=8 // device_batch,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(50, steps // 4),
        adam_beta2=0.95,
        weight_decay=0.01,
        save_steps=200,
        save_total_limit=1,
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(ByT5Tokenizer(), mlm=False)
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder / "trainer") if (folder / "trainer").is_dir() else None)
    return [bits_per_token(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1600, help="steps of 8 rows with exact attention, before the conversion")
    parser.add_argument("--further-steps", type=int, default=300, help="steps after it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = ByT5Tokenizer()
    training, held_out = standard_library()
    rows = pack(tokenizer, training, CONTEXT)
    held_out = torch.tensor(pack(tokenizer, first_files(held_out, EVALUATED), EVALUATED, 1)["input_ids"])

    base = args.output / "base"
    if not (base / "figures.json").is_file():
        set_seed(args.seed)
        model = new_model()
        curve = train(model, rows, base, args.steps, 3e-3, args.seed, 8)
        model.save_pretrained(base)
        write_json(base / "figures.json", {"bits_per_byte": evaluate(model, held_out), "curve": curve})


if __name__ == "__main__":
    main()

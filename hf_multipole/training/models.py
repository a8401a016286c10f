"""The tokenizer and the model that a run starts from."""

import dataclasses
import inspect
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..integration.conversion import convert, extend_context, trained_context
from ..modeling.hierarchy import level_count
from ..modeling.summaries import DirectSummary
from .arguments import ModelArguments, check_names
from .data import first_files
from .errors import load

# Text that a new tokenizer is learned from: more takes minutes, and changes little.
_TOKENIZER_BYTES = 1 << 26


def build_tokenizer(args: ModelArguments, texts: Iterable[str], masked: bool) -> PreTrainedTokenizerBase:
    """The named tokenizer, the checkpoint's, one that is learned from the training texts, or bytes. Raises ValueError where it has no
    mask token and ``masked`` asks for one.
    """
    if args.new_tokenizer_size is not None:
        return learned_tokenizer(first_files(texts, _TOKENIZER_BYTES), args.new_tokenizer_size, masked)
    source = args.tokenizer_name or args.model_name_or_path
    if not source:
        # One of the ids that ByT5 itself masks with.
        return ByT5Tokenizer(**{"mask_token": "<extra_id_0>"} if masked else {})
    revision = None if args.tokenizer_name else args.model_revision
    options = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = load("tokenizer", source, AutoTokenizer.from_pretrained, **options)
    if masked and tokenizer.mask_token is None:
        raise ValueError(f"the tokenizer {source} has no mask token, which masked language modelling needs; give another tokenizer_name")
    return tokenizer


def learned_tokenizer(texts: list[str], size: int, masked: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., arXiv 1508.07909) of at most ``size`` tokens, the same for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>"} | ({"mask_token": "<mask>"} if masked else {})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, context_length: int, masked: bool) -> PreTrainedModel:
    """The checkpoint, or a new model of that configuration, with its head for next or for masked tokens.

    Raises ValueError and OSError for a checkpoint that does not exist or does not fit the tokenizer.
    """
    auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    options = {"dtype": args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if args.model_name_or_path:
        options |= {"revision": args.model_revision or "main", "trust_remote_code": args.trust_remote_code}
        model = load("checkpoint", args.model_name_or_path, auto_class.from_pretrained, **options)
    else:
        if args.dtype == "auto":
            raise ValueError("dtype auto is the dtype of a checkpoint; a new model needs one by name")
        config_class = CONFIG_MAPPING[args.model_type]
        values = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        values |= {"vocab_size": len(tokenizer), "max_position_embeddings": context_length}
        if masked:
            values["is_causal"] = False
        known = {field.name for field in dataclasses.fields(config_class)}
        overrides: Any = args.config_overrides
        config = config_class(**{name: value for name, value in values.items() if name in known} | overrides)
        model = auto_class.from_config(config, **options)
    if model.dtype == torch.float16:
        raise ValueError("parameters in float16 are too coarse for training: give dtype float32 (and fp16 for mixed precision)")
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {size}: give the model's own tokenizer"
        )
    model = converted(model, args.convert) if args.convert else model
    before = trained_context(model) if args.model_name_or_path else None
    if before is not None and before < context_length:
        # What is farther away than in the training of before would not be attended to.
        extend_context(model, context_length)
    return model


def converted(model: PreTrainedModel, options: Any) -> PreTrainedModel:
    """The model with another kind of attention: the ``convert`` section of a configuration."""
    options = {"kind": "multipole"} | options
    check_names(options, inspect.signature(convert).parameters, "convert")
    return convert(model, **options)


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int, masked: bool) -> None:
    """Raises ValueError for a model that would fail, or mislead, after it was trained.

    longest: tokens of the longest rows, those of evaluation included.
    """
    for module in model.modules():
        if isinstance(module, DirectSummary):
            module.check_levels(level_count(longest, module.block_size))
    name = type(model).__name__
    if not masked and not any(parameter.is_meta for parameter in model.parameters()):
        if sees_later_tokens(model):
            raise ValueError(f"{name} sees later tokens, so that it cannot learn to tell them: use run_mlm.py, or make it a decoder")
    # Code that comes with a checkpoint chooses for itself.
    if isinstance(tokenizer, ByT5Tokenizer) and not type(model).__module__.startswith("transformers_modules."):
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            try:
                same = AutoTokenizer.from_pretrained(folder)("a\n").input_ids == tokenizer("a\n").input_ids
            except Exception:  # whatever the other tokenizer fails at
                same = False
        if not same:
            raise ValueError(
                f"AutoTokenizer does not load a tokenizer of bytes with a model of type {model.config.model_type}, whatever is saved: "
                "give a tokenizer_name, or another model_type"
            )


def sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether the last token of a row changes the logits before it: tried out."""
    row = torch.arange(8) + 5
    # More than rounding, which may depend on what else is computed.
    return _difference(model, row, torch.cat([row[:-1], row[:1]]), slice(-1)) > 64 * torch.finfo(model.dtype).eps


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a token is out of reach of the text before its own in a row with ``position_ids`` that start anew: tried out."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    # Longer than the near field of small blocks.
    row = torch.arange(96) % (model.config.get_text_config().vocab_size - 2)
    other = torch.cat([row[:48] + 1, row[48:]])
    position_ids = torch.arange(48, device=model.device).repeat(2)[None]
    return _difference(model, row, other, slice(48, None), position_ids=position_ids, use_cache=False) <= 1e-4


@torch.no_grad()
def _difference(model: PreTrainedModel, row: torch.Tensor, other: torch.Tensor, at: slice, **inputs) -> float:
    """The largest difference between the logits of two rows of tokens ``(n,)``, at some of them, as a share of the largest logit."""
    training = model.training
    out = [model.eval()(input_ids=ids[None].to(model.device), **inputs).logits[:, at].float() for ids in (row, other)]
    model.train(training)
    return ((out[0] - out[1]).abs().max() / out[0].abs().max().clamp(min=torch.finfo(torch.float32).tiny)).item()

"""Continues a prompt, or reads a long text once into a state, to be asked many times."""

import argparse
import copy
import sys
import time

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from ..modeling.multipole_cache import MultipoleCache
from ..training.errors import load, told_in_a_line


def prepare(args: argparse.Namespace):
    """Model, tokenizer, prompt and cache; raises before any work is done."""
    text = args.prompt if args.prompt is not None else args.prompt_file.read_text(encoding="utf-8")
    if not text:
        raise ValueError("the prompt is empty")
    if args.save_state and (args.save_state.is_dir() or not args.save_state.parent.is_dir()):
        raise ValueError(f"--save-state {args.save_state} must be a file in a folder that exists")
    tokenizer = load("checkpoint", args.model, AutoTokenizer.from_pretrained)
    model = load("checkpoint", args.model, AutoModelForCausalLM.from_pretrained).eval()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    cache = MultipoleCache.load(args.load_state, model) if args.load_state else MultipoleCache(config=model.config)
    return text, tokenizer, model, ids, cache


def read(model, ids, cache, chunk: int) -> None:
    """Takes a text into the cache, a chunk at a time."""
    with tqdm(total=ids.shape[1], unit=" tokens", desc="reading", disable=ids.shape[1] <= chunk) as bar:
        for part in ids.split(chunk, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
            bar.update(part.shape[1])


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    with told_in_a_line(args.program):
        write(args, *prepare(args))


def write(args: argparse.Namespace, text: str, tokenizer, model, ids: torch.Tensor, cache: MultipoleCache) -> None:
    set_seed(args.seed)
    # The last token waits: generate takes it in, for the logits of the next one.
    if ids.shape[1] > 1:
        read(model, ids[:, :-1], cache, args.chunk)
    if args.save_state:
        whole = copy.deepcopy(cache) if args.max_new_tokens else cache
        model(ids[:, -1:], past_key_values=whole)
        whole.bind(model)
        whole.save(args.save_state)
        print(f"[state of {whole.get_seq_length():,} tokens, {whole.nbytes / 1e6:.2f} MB: {args.save_state}]", file=sys.stderr)
        del whole
    if args.max_new_tokens == 0:
        return

    length = cache.get_seq_length()
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {"do_sample": False}
    if args.prompt is not None:
        print(text, end="", flush=True)
    start = time.perf_counter()
    out = model.generate(
        ids[:, -1:],
        attention_mask=torch.ones(1, length + 1, dtype=torch.long, device=model.device),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    new = out.shape[1] - 1
    seconds = time.perf_counter() - start
    print(
        f"[{new} tokens, {new / seconds:.1f} a second; state of {cache.get_seq_length():,} tokens: {cache.nbytes / 1e6:.2f} MB]",
        file=sys.stderr,
    )

"""Continues a prompt with a causal checkpoint; the text is printed as it is made.

    python scripts/generate.py --model runs/quickstart --prompt "def main():" --max-new-tokens 200

A long document can be read once and asked many times; of a multipole layer its state takes one or two megabytes, whatever its length:

    python scripts/generate.py --model runs/quickstart --prompt-file document.txt --max-new-tokens 0 --save-state document.state
    python scripts/generate.py --model runs/quickstart --load-state document.state --prompt "A question about it"
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from hf_multipole import MultipoleCache


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub name")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for greedy decoding")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the prompt that are read at once")
    parser.add_argument("--load-state", type=Path, help="state of a text that was read before; the prompt goes on from there")
    parser.add_argument("--save-state", type=Path, help="file for the state after the prompt")
    args = parser.parse_args()
    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("chunk", 1)):
        if getattr(args, name) < least:
            sys.exit(f"generate.py: --{name.replace('_', '-')} is {getattr(args, name)}, but must be at least {least}")
    return args


def prepare(args):
    """Model, tokenizer, prompt and cache; raises before any work is done."""
    text = args.prompt if args.prompt is not None else args.prompt_file.read_text(encoding="utf-8")
    if not text:
        raise ValueError("the prompt is empty")
    if args.save_state and (args.save_state.is_dir() or not args.save_state.parent.is_dir()):
        raise ValueError(f"--save-state {args.save_state} must be a file in a folder that exists")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    cache = MultipoleCache.load(args.load_state, model) if args.load_state else MultipoleCache(config=model.config)
    return text, tokenizer, model, ids, cache


def read(model, ids, cache, chunk: int) -> None:
    """Takes a text into the cache, a chunk at a time."""
    with tqdm(total=ids.shape[1], unit=" tokens", desc="reading", disable=ids.shape[1] <= chunk) as bar:
        for part in ids.split(chunk, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
            bar.update(part.shape[1])


def main() -> None:
    args = parse()
    try:
        run(args)
    except (ValueError, OSError, HFValidationError, StrictDataclassError) as error:
        sys.exit(f"generate.py: {str(error.__cause__ or error).splitlines()[0]}")


@torch.inference_mode()
def run(args) -> None:
    text, tokenizer, model, ids, cache = prepare(args)
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
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **sampling,
    )
    new = out.shape[1] - 1
    seconds = time.perf_counter() - start
    print(
        f"[{new} tokens, {new / seconds:.1f} a second; state of {cache.get_seq_length():,} tokens: {cache.nbytes / 1e6:.2f} MB]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()

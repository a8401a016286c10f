"""Continues a prompt with a causal checkpoint; the text is printed as it is made.

python scripts/generate.py --model runs/quickstart --prompt "def main():" --max-new-tokens 200
"""

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

import hf_multipole  # noqa: F401  (registers the multipole models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub name")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", type=argparse.FileType(encoding="utf-8"))
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for greedy decoding")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = args.prompt if args.prompt is not None else args.prompt_file.read()
    if not text:
        sys.exit("generate.py: the prompt is empty")

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=TextStreamer(tokenizer), **sampling)
    new = out.shape[1] - inputs.input_ids.shape[1]
    print(f"[{new} tokens, {new / (time.perf_counter() - start):.1f} a second]", file=sys.stderr)


if __name__ == "__main__":
    main()

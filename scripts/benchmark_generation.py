"""What generation costs at growing lengths: a step of one layer, a whole model writing, a long prompt.

    python scripts/benchmark_generation.py --threads 2 --output runs/benchmark-generation
    python scripts/benchmark_generation.py --contexts 4096 65536 --tokens 4000 --prompts 16384 65536

Steps of attention: one query on the state of multipole attention (hierarchical summaries) and, in turns with it, on a full cache
by scaled_dot_product_attention, at each of --contexts. The time of a step is the mean over whole blocks, so that making summaries
is part of it; the median of several such means is given. The full cache is not copied for the new token, which flatters it.
Writing: a model of --layers layers generates --tokens tokens with model.generate, once with its state and once with full attention
and all keys; time of every 1,000 tokens, resident memory at their end. Prompts: the same model reads --prompts tokens in chunks.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import machine
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from hf_multipole import MultipoleCache, MultipoleConfig, MultipoleForCausalLM
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.state_multipole import MultipoleState, NewTokens
from hf_multipole.modeling.summaries import HierarchicalSummary

WINDOW = 1000


def median(values) -> float:
    return sorted(values)[len(values) // 2]


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


@torch.no_grad()
def steps(o, context: int, bar) -> dict:
    """Seconds of a step and bytes of the state, for both kinds of cache, with ``context`` tokens behind."""
    torch.manual_seed(0)
    key_summary, value_summary = (HierarchicalSummary(o.block_size, o.rank, o.heads, o.head_dim) for _ in range(2))
    options = {"key_summary": key_summary, "value_summary": value_summary, "size_weighting": True, "far_bias": None}
    options |= {"softcap": None, "scale": None, "rotary": None}
    chunk = min(context, 16384)
    keys, values = (torch.empty(1, o.heads, context, o.head_dim) for _ in range(2))
    token = torch.randn(1, o.heads, 1, o.head_dim)
    state = MultipoleState(token, token, o.block_size, o.rank, level_count(context, o.block_size), o.block_size, False)
    for start in range(0, context, chunk):
        part = slice(start, min(context, start + chunk))
        for x in (keys, values):
            x[:, :, part].normal_()
        state.attend(*(x[:, :, part] for x in (values, keys, values)), [NewTokens(0, part.stop - start)], **options)
        bar.update(part.stop - start)

    new = [NewTokens(0, 1)]
    # Warm, and to the beginning of a block.
    for _ in range(2 * o.block_size - state.rows[0].length % o.block_size):
        state.attend(token, token, token, new, **options)
    own, full = [], []
    for _ in range(o.repeats):
        start = time.perf_counter()
        for _ in range(2 * o.block_size):
            state.attend(token, token, token, new, **options)
        own.append((time.perf_counter() - start) / (2 * o.block_size))
        count = max(1, min(64, 2**22 // context))
        start = time.perf_counter()
        for _ in range(count):
            F.scaled_dot_product_attention(token, keys, values)
        full.append((time.perf_counter() - start) / count)
    # Room to go back beside what attention needs: one block of tokens, and one group of each level.
    spare = (state.spare * o.block_size + state.spare * state.levels * o.rank) * o.heads * o.head_dim * 2 * keys.element_size()
    size = sum(x.nbytes for x in state.tensors().values())
    return {
        "context": context,
        "state": {"seconds": median(own), "bytes": size, "bytes_without_room_to_go_back": size - spare},
        "full": {"seconds": median(full), "bytes": keys.nbytes + values.nbytes},
    }


class Clock(BaseStreamer):
    """Notes time and memory at every ``WINDOW`` tokens."""

    def __init__(self, bar):
        self.bar, self.count, self.times, self.memory = bar, -1, [], []

    def put(self, value):
        self.count += 1  # the prompt comes first
        if self.count % WINDOW == 0:
            self.times.append(time.perf_counter())
            self.memory.append(resident())
        self.bar.update(self.count > 0)

    def end(self):
        pass


def build(o, implementation: str) -> MultipoleForCausalLM:
    torch.manual_seed(0)
    config = MultipoleConfig(
        vocab_size=384,
        hidden_size=o.heads * o.head_dim,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        block_size=o.block_size,
        rank=o.rank,
        max_position_embeddings=max([o.tokens, *o.prompts]) + WINDOW,
        attn_implementation=implementation,
    )
    return MultipoleForCausalLM(config).eval()


def write(o, implementation: str, bar) -> dict:
    model, clock = build(o, implementation), Clock(bar)
    prompt = torch.randint(3, 384, (1, 64))
    model.generate(prompt, max_new_tokens=o.tokens, do_sample=False, eos_token_id=-1, streamer=clock)
    spans = [later - earlier for earlier, later in zip(clock.times, clock.times[1:])]
    return {"seconds_per_1000": spans, "resident_bytes": clock.memory}


@torch.inference_mode()
def read(o, length: int, bar) -> dict:
    model = build(o, "multipole")
    cache = MultipoleCache(config=model.config)
    before, most, start = resident(), 0, time.perf_counter()
    ids = torch.randint(3, 384, (1, length))
    for part in ids.split(o.chunk, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
        most = max(most, resident())
        bar.update(part.shape[1])
    return {"prompt": length, "seconds": time.perf_counter() - start, "extra_bytes": most - before, "state_bytes": cache.nbytes}


def table(record) -> str:
    def rows(*heads):
        lines.extend(["", f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)])
        return lambda *cells: lines.append(f"| {' | '.join(cells)} |")

    lines = []
    add = rows("context", "state, ms a token", "full cache, ms a token", "state, MB", "without room to go back", "full cache, MB")
    for r in record["steps"]:
        own, full = r["state"], r["full"]
        sizes = (own["bytes"] / 1e6, own["bytes_without_room_to_go_back"] / 1e6)
        add(
            f"{r['context']:,}",
            *(f"{x['seconds'] * 1e3:.3f}" for x in (own, full)),
            *(f"{x:.2f}" for x in sizes),
            f"{full['bytes'] / 1e6:,.1f}",
        )
    add = rows("tokens written", "state, s per 1,000", "full cache, s per 1,000", "resident, MB", "full cache, resident, MB")
    runs = record["writing"].values()
    for i, spans in enumerate(zip(*(run["seconds_per_1000"] for run in runs))):
        memory = (run["resident_bytes"][i + 1] / 1e6 for run in runs)
        add(f"{(i + 1) * WINDOW:,}", *(f"{x:.2f}" for x in spans), *(f"{x:,.0f}" for x in memory))
    add = rows("prompt", "seconds", "tokens a second", "extra memory, MB", "state, MB")
    for r in record["prompts"]:
        speed, sizes = r["prompt"] / r["seconds"], (r["extra_bytes"] / 1e6, r["state_bytes"] / 1e6)
        add(f"{r['prompt']:,}", f"{r['seconds']:.1f}", f"{speed:,.0f}", f"{sizes[0]:,.0f}", f"{sizes[1]:.2f}")
    return "\n".join(lines[1:])


def draw(record, path: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    contexts = [r["context"] for r in record["steps"]]
    for name, label in (("state", "multipole state"), ("full", "full cache, SDPA")):
        left.plot(contexts, [r[name]["seconds"] * 1e3 for r in record["steps"]], "o-", label=label)
    left.set(xscale="log", yscale="log", xlabel="context", title="attention of one layer, ms a token", xticks=contexts)
    left.set_xticklabels([f"{n:,}" for n in contexts])
    left.minorticks_off()
    for name, label in (("multipole", "multipole state"), ("sdpa", "full cache, SDPA")):
        run = record["writing"][name]
        tokens = [(i + 1) * WINDOW for i in range(len(run["seconds_per_1000"]))]
        middle.plot(tokens, run["seconds_per_1000"], label=label)
        right.plot(tokens, [(x - run["resident_bytes"][0]) / 1e6 for x in run["resident_bytes"][1:]], label=label)
    middle.set(xlabel="tokens written", title="whole model, seconds per 1,000 tokens")
    middle.set_ylim(bottom=0)
    right.set(xlabel="tokens written", title="whole model, memory above the start, MB")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    picture.savefig(path, dpi=130)


def parse(arguments):
    parser = argparse.ArgumentParser(description="What generation costs at growing lengths.", allow_abbrev=False)
    sizes = {"heads": 8, "head-dim": 64, "block-size": 64, "rank": 4, "layers": 2, "tokens": 20000, "chunk": 8192, "repeats": 9}
    for name, default in (sizes | {"threads": torch.get_num_threads()}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 65536, 1048576])
    parser.add_argument("--prompts", type=int, nargs="+", default=[65536, 131072, 262144])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-generation"))
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    numbers = {name: min(x) if isinstance(x, list) else x for name, x in vars(o).items() if name not in ("output", "part")}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if x < 1]
    faults += [f"--rank {o.rank} must divide --block-size {o.block_size}"] if not faults and o.block_size % o.rank else []
    faults += [f"--tokens {o.tokens} must be at least {2 * WINDOW}"] if o.tokens < 2 * WINDOW else []
    faults += [f"--output {o.output} is a file; name a folder"] if o.output.exists() and not o.output.is_dir() else []
    if faults:
        sys.exit("\n".join(faults))
    return o


def part(o) -> dict:
    """One measurement, in this process."""
    kind, value = o.part
    value = value if kind == "write" else int(value)
    with tqdm(total=o.tokens if kind == "write" else value, unit=" tokens", desc=f"{kind} {value}", mininterval=1) as bar:
        return {"steps": steps, "write": write, "read": read}[kind](o, value, bar)


def in_new_process(arguments, kind: str, value) -> dict:
    """A measurement in a process of its own: what the others left in memory would blur its figures."""
    done = subprocess.run([sys.executable, __file__, *arguments, "--part", kind, str(value)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"benchmark_generation.py: {kind} {value} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments) -> None:
    o = parse(arguments)
    torch.set_num_threads(o.threads)
    if o.part:
        return print(json.dumps(part(o)))
    o.output.mkdir(parents=True, exist_ok=True)
    record = {
        "steps": [in_new_process(arguments, "steps", context) for context in sorted(o.contexts)],
        "writing": {name: in_new_process(arguments, "write", name) for name in ("multipole", "sdpa")},
        "prompts": [in_new_process(arguments, "read", length) for length in sorted(o.prompts)],
    }
    command = shlex.join(["python", *sys.argv])
    options = {name: x for name, x in vars(o).items() if name not in ("output", "part")}
    record |= {"command": command, "machine": machine(argparse.Namespace(device="cpu")), "options": options}
    print(text := table(record))
    (o.output / "benchmark-generation.json").write_text(json.dumps(record, indent=1) + "\n")
    (o.output / "benchmark-generation.md").write_text(f"    {command}\n\n{text}\n")
    if find_spec("matplotlib"):
        draw(record, o.output / "benchmark-generation.png")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What generation costs at growing lengths: a step of one layer, a whole model writing, a long prompt.

    python -m scripts.benchmarks.generation --threads 2 --output runs/benchmark-generation
    python -m scripts.benchmarks.generation --contexts 4096 65536 --tokens 4000 --prompts 16384 65536

Steps of attention: one query on the state of multipole attention (O(n log n), and O(n); hierarchical summaries), on a full cache by
scaled_dot_product_attention, and on those of peers that can generate: the tokens of two blocks, as local attention keeps them, and the
sums of linear attention (peers.py). In turns, at each of --contexts with one row, and at --batch-context with --batch rows. The time of
a step is the mean over whole blocks, so that making summaries is part of it; the median of several such means is given. The full cache
is not copied for the new token, which flatters it. "x floor": over the time of reading the state once at the rate of a copy in memory
larger than caches, or of its operations at the rate of a large matrix product, in the same process, as counted by cost_model.py; a state
that stays in a cache may be faster. With --clock processor all times are seconds of all threads instead of wall time, which on a
busy machine, with --threads 1, count less of what others do.
Writing: a model of --layers layers generates --tokens tokens with model.generate, once with its state and once with full attention
and all keys; time of every 1,000 tokens, resident memory at their end. Prompts: the same model reads --prompts tokens in chunks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from hf_multipole import MultipoleCache, MultipoleConfig, MultipoleForCausalLM
from hf_multipole.modeling.calls import Call
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.multipole_state import MultipoleState, NewTokens
from hf_multipole.modeling.options import MultipoleOptions
from hf_multipole.modeling.shared_query_state import LinearState
from hf_multipole.modeling.state_slots import Layout
from hf_multipole.modeling.summaries import HierarchicalSummary
from hf_multipole.training.figures import colours, figure, label_ends
from scripts.benchmarks import cost_model
from scripts.benchmarks.cost_model import Layer
from scripts.common import peers
from scripts.common.measuring import machine, yardsticks
from scripts.common.reports import command, table, write_beside

WINDOW = 1000
KINDS = {"multipole": "multipole", "multipole_linear": "O(n) form", "local": "local", "linear": "linear", "full": "full cache"}


def now(o) -> float:
    return time.process_time() if o.clock == "processor" else time.perf_counter()


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


@torch.no_grad()
def steps(o, context: int, batch: int, bar) -> dict:
    """Seconds of a step and bytes of the state, of each kind, with ``context`` tokens behind in each of ``batch`` rows."""
    torch.manual_seed(0)
    key_summary, value_summary = (HierarchicalSummary(o.block_size, o.rank, o.heads, o.head_dim) for _ in range(2))
    learned = Call(MultipoleOptions(block_size=o.block_size, rank=o.rank), key_summary, value_summary)
    chunk = min(context, 16384)
    keys, values = (torch.empty(1, o.heads, context, o.head_dim) for _ in range(2))
    token = torch.randn(1, o.heads, 1, o.head_dim)
    layout, levels = Layout(o.block_size, o.rank, spare=1), level_count(context, o.block_size)
    kinds = {"multipole": MultipoleState, "multipole_linear": LinearState}
    states = {name: kind(token, token, token, layout, levels) for name, kind in kinds.items()}
    for start in range(0, context, chunk):
        part = slice(start, min(context, start + chunk))
        for x in (keys, values):
            x[:, :, part].normal_()
        for state in states.values():
            state.attend(*(x[:, :, part] for x in (values, keys, values)), [NewTokens(0, part.stop - start)], learned)
        bar.update(part.stop - start)
    for state in states.values():
        state.select(torch.zeros(batch, dtype=torch.long))  # the same row again and again, each in its own memory
    keys, values, token = (x.repeat(batch, 1, 1, 1) for x in (keys, values, token))
    ring = [x[:, :, -2 * o.block_size :].clone() for x in (keys, values)]
    sums = torch.zeros(batch, o.heads, o.head_dim, o.head_dim + 1)
    new, at = [NewTokens(0, 1)] * batch, 0

    def local():
        nonlocal at
        for x in ring:
            x[:, :, at] = token[:, :, 0]
        at = (at + 1) % ring[0].shape[2]
        return F.scaled_dot_product_attention(token, *ring)

    calls = {kind: (lambda state=state: state.attend(token, token, token, new, learned)) for kind, state in states.items()}
    calls |= {"local": local, "linear": lambda: peers.linear_step(token, token, token, sums)}
    calls["full"] = lambda: F.scaled_dot_product_attention(token, keys, values)
    counts = dict.fromkeys(calls, 2 * o.block_size) | {"full": max(1, min(64, 2**22 // (context * batch)))}
    multiply, copy, flops, moved = yardsticks("cpu", torch.float32)
    calls, counts = calls | {"product": multiply, "copy": copy}, counts | {"product": 1, "copy": 1}

    # Warm, and to the beginning of a block.
    for _ in range(2 * o.block_size - context % o.block_size):
        for kind in states:
            calls[kind]()
    samples = {name: [] for name in calls}
    for _ in range(o.repeats):
        for name, call in calls.items():
            start = now(o)
            for _ in range(counts[name]):
                call()
            samples[name].append((now(o) - start) / counts[name])
    seconds = {name: statistics.median(x) for name, x in samples.items()}
    held = {kind: list(state.tensors().values()) for kind, state in states.items()}
    held |= {"local": ring, "linear": [sums], "full": [keys, values]}
    layer = Layer(context, batch, o.heads, o.heads, o.head_dim, block_size=o.block_size, rank=o.rank)
    found = {
        "context": context,
        "batch": batch,
        "flops_per_second": flops / seconds["product"],
        "bytes_per_second": moved / seconds["copy"],
    }
    for kind, tensors in held.items():
        cost = cost_model.decode(kind, layer)
        floor = max(cost.flops / found["flops_per_second"], cost.bytes / found["bytes_per_second"])
        found[kind] = {"seconds": seconds[kind], "floor": floor, "bytes": sum(x.nbytes for x in tensors)}
    found["multipole"]["bytes_without_room_to_go_back"] = cost_model.decode("multipole", layer._replace(spare=0)).memory
    return found


class Clock(BaseStreamer):
    """Notes time and memory at every ``WINDOW`` tokens."""

    def __init__(self, o, bar):
        self.options, self.bar, self.count, self.times, self.memory = o, bar, -1, [], []

    def put(self, value):
        self.count += 1  # the prompt comes first
        if self.count % WINDOW == 0:
            self.times.append(now(self.options))
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
    model, clock = build(o, implementation), Clock(o, bar)
    prompt = torch.randint(3, 384, (1, 64))
    model.generate(prompt, max_new_tokens=o.tokens, do_sample=False, eos_token_id=-1, streamer=clock)
    spans = [later - earlier for earlier, later in zip(clock.times, clock.times[1:])]
    return {"seconds_per_1000": spans, "resident_bytes": clock.memory}


@torch.inference_mode()
def read(o, length: int, bar) -> dict:
    model = build(o, "multipole")
    cache = MultipoleCache(config=model.config)
    before, most, start = resident(), 0, now(o)
    ids = torch.randint(3, 384, (1, length))
    for part in ids.split(o.chunk, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
        most = max(most, resident())
        bar.update(part.shape[1])
    return {"prompt": length, "seconds": now(o) - start, "extra_bytes": most - before, "state_bytes": cache.nbytes}


def markdown(record) -> str:
    steps, runs = record["steps"], record["writing"].values()
    times = [
        [f"{r['context']:,}", f"{r['batch']}"]
        + [x for kind in KINDS for x in (f"{r[kind]['seconds'] * 1e3:.3f}", f"{r[kind]['seconds'] / r[kind]['floor']:.3g}")]
        for r in steps
    ]
    sizes = [
        [f"{r['context']:,}", f"{r['batch']}"]
        + [f"{x / 1e6:,.2f}" for x in (*(r[kind]["bytes"] for kind in KINDS), r["multipole"]["bytes_without_room_to_go_back"])]
        for r in steps
    ]
    writing = [
        [f"{(i + 1) * WINDOW:,}", *(f"{x:.2f}" for x in spans), *(f"{run['resident_bytes'][i + 1] / 1e6:,.0f}" for run in runs)]
        for i, spans in enumerate(zip(*(run["seconds_per_1000"] for run in runs)))
    ]
    reading = [
        [f"{r['prompt']:,}", f"{r['seconds']:.1f}", f"{r['prompt'] / r['seconds']:,.0f}"]
        + [f"{r['extra_bytes'] / 1e6:,.0f}", f"{r['state_bytes'] / 1e6:.2f}"]
        for r in record["prompts"]
    ]
    place, names = ["context", "rows"], KINDS.values()
    heads = ["tokens written", "state, s per 1,000", "full cache, s per 1,000", "resident, MB", "full cache, resident, MB"]
    parts = [
        table([*place, *(head for name in names for head in (f"{name}, ms a step", "x floor"))], times, 0),
        table([*place, *(f"{name}, MB" for name in names), "multipole without room to go back"], sizes, 0),
        table(heads, writing, 0),
        table(["prompt", "seconds", "tokens a second", "extra memory, MB", "state, MB"], reading, 0),
    ]
    return "\n\n".join(parts)


def draw(record, path: Path) -> None:
    """A step against context and rows, with floors; seconds and memory of a whole model that writes."""
    context, shades = record["options"]["batch_context"], colours(KINDS.values())
    sides = (
        ("context", [r for r in record["steps"] if r["batch"] == 1], "Attention of one layer, one row: ms a step"),
        ("batch", [r for r in record["steps"] if r["context"] == context], f"The same with {context:,} tokens behind: ms a step"),
    )
    with figure(path, 2, 2, (13, 8.4), "solid: measured; dashed: least possible at the measured rates") as (_, (above, (middle, last))):
        for axes, (name, found, title) in zip(above, sides):
            found = sorted(found, key=lambda r: r[name])
            ticks = [r[name] for r in found]
            for kind, label in KINDS.items():
                axes.plot(ticks, [r[kind]["seconds"] * 1e3 for r in found], "o-", color=shades[label], markersize=4, label=label)
                axes.plot(ticks, [r[kind]["floor"] * 1e3 for r in found], "--", color=shades[label], linewidth=0.9)
            axes.set(yscale="log", xlabel={"context": "tokens behind", "batch": "rows"}[name], title=title)
            axes.set_xscale("log", base=2)
        for name, label in (("multipole", "multipole state"), ("sdpa", "full cache")):
            run, style = record["writing"][name], {"color": colours([label])[label], "label": label}
            tokens = [(i + 1) * WINDOW for i in range(len(run["seconds_per_1000"]))]
            middle.plot(tokens, run["seconds_per_1000"], **style)
            last.plot(tokens, [(x - run["resident_bytes"][0]) / 1e6 for x in run["resident_bytes"][1:]], **style)
        middle.set(xlabel="tokens written", title="A whole model: seconds per 1,000 tokens")
        middle.set_ylim(bottom=0)
        last.set(xlabel="tokens written", title="A whole model: memory above the start, MB")
        for axes in (*above, middle, last):
            axes.grid(alpha=0.25)
            label_ends(axes)


def parse(arguments):
    parser = argparse.ArgumentParser(description="What generation costs at growing lengths.", allow_abbrev=False)
    sizes = {"heads": 8, "head-dim": 64, "block-size": 64, "rank": 4, "layers": 2, "tokens": 20000, "chunk": 8192, "repeats": 9}
    sizes |= {"batch-context": 16384}
    for name, default in (sizes | {"threads": torch.get_num_threads()}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 65536, 1048576])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="rows of a step, at --batch-context")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="which seconds; default: wall")
    parser.add_argument("--prompts", type=int, nargs="+", default=[65536, 131072, 262144])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-generation"))
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    numbers = {name: min(x) if isinstance(x, list) else x for name, x in vars(o).items() if name not in ("output", "part", "clock")}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if x < 1]
    faults += [f"--rank {o.rank} must divide --block-size {o.block_size}"] if not faults and o.block_size % o.rank else []
    faults += [f"--tokens {o.tokens} must be at least {2 * WINDOW}"] if o.tokens < 2 * WINDOW else []
    faults += [f"--output {o.output} is a file; name a folder"] if o.output.exists() and not o.output.is_dir() else []
    if faults:
        sys.exit("\n".join(faults))
    return o


def part(o) -> dict:
    """One measurement, in this process."""
    kind, *values = o.part
    values = values if kind == "write" else [int(x) for x in values]
    with tqdm(total=o.tokens if kind == "write" else values[0], unit=" tokens", desc=" ".join(o.part), mininterval=1) as bar:
        return {"steps": steps, "write": write, "read": read}[kind](o, *values, bar)


def in_new_process(arguments, *task) -> dict:
    """A measurement in a process of its own: what the others left in memory would blur its figures."""
    task = [str(x) for x in task]
    command = [sys.executable, "-m", "scripts.benchmarks.generation", *arguments, "--part", *task]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"generation.py: {' '.join(task)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments) -> None:
    o = parse(arguments)
    torch.set_num_threads(o.threads)
    if o.part:
        return print(json.dumps(part(o)))
    o.output.mkdir(parents=True, exist_ok=True)
    shapes = sorted({(context, 1) for context in o.contexts} | {(o.batch_context, batch) for batch in o.batch})
    record = {
        "steps": [in_new_process(arguments, "steps", *shape) for shape in shapes],
        "writing": {name: in_new_process(arguments, "write", name) for name in ("multipole", "sdpa")},
        "prompts": [in_new_process(arguments, "read", length) for length in sorted(o.prompts)],
    }
    options = {name: x for name, x in vars(o).items() if name not in ("output", "part")}
    record |= {"command": command(), "machine": machine(), "options": options}
    print(text := markdown(record))
    write_beside(o.output / "benchmark-generation.md", record)
    (o.output / "benchmark-generation.md").write_text(f"    {command()}\n\n{text}\n")
    if find_spec("matplotlib"):
        draw(record, o.output / "benchmark-generation.png")


if __name__ == "__main__":
    main(sys.argv[1:])

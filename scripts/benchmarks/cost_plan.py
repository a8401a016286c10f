"""A plan on paper: what the attention of one layer costs at lengths that were not run, on one device and on many.

    python -m scripts.benchmarks.cost_plan --report model_cards/reports/cost.md
    python -m scripts.benchmarks.cost_plan --measured runs/benchmark/benchmark.json --report model_cards/reports/cost.md

Operations, bytes and memory are those of cost_model.py. A device is taken to reach a share of its rates, --share-full for exact
attention and --share-multipole for multipole attention: assumptions, like the rates of devices and links. With --measured, a record of
attention.py, the same lengths are also worked out for the processor it ran on, at its measured rates and the shares that were reached.
Rows are cut into as many consecutive parts as there are devices. Exact attention is ring attention, taken to be balanced and its messages
hidden behind the products: the longer of the two counts. Multipole attention waits for all its messages: the sum counts.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from hf_multipole.training.figures import colours, figure, label_ends
from scripts.benchmarks import cost_model
from scripts.benchmarks.cost_model import Layer
from scripts.common.reports import command, table

KINDS = {"full": "exact", "multipole": "multipole", "multipole_linear": "O(n) form"}
MEASURED = {"full": "sdpa", "multipole": "multipole-hierarchical", "multipole_linear": "multipole-linear"}
PASSES = {"forward": cost_model.forward, "both": cost_model.both}


def on_devices(o, kind: str, layer: Layer, devices: int, name: str) -> dict:
    """Seconds, bytes received and bytes held by each device in a pass."""
    cost, share = PASSES[name](kind, layer), o.share_full if kind == "full" else o.share_multipole
    work = max(cost.flops / (o.tflops * 1e12), cost.bytes / (o.bandwidth * 1e9)) / share / devices
    received, messages = cost_model.exchange(kind, layer, devices, name == "both")
    travel = received / ((o.link if devices <= o.node else o.network) * 1e9) + messages * o.latency * 1e-6
    arguments = layer.query_bytes * (2 if name == "both" else 1) + 2 * layer.key_bytes
    # Of a ring, the keys and values at work and those that come in; in a backward pass with their gradients.
    ring = (8 if name == "both" else 4) * layer.key_bytes // devices
    buffers = ring if kind == "full" and devices > 1 else received
    return {
        "seconds": max(work, travel) if kind == "full" else work + travel,
        "travel": travel,
        "waits": travel > work,
        "received": received,
        "memory": (arguments + cost.memory) // devices + buffers,
    }


def shown(x: float, units: dict[str, float]) -> str:
    """A number in the largest unit that it has one of, two or three digits."""
    name, unit = next(((name, unit) for name, unit in units.items() if x >= unit), list(units.items())[-1])
    return f"{x / unit:,.3g} {name}" if x / unit < 1000 else f"{x / unit:,.0f} {name}"


def duration(seconds: float) -> str:
    return shown(seconds, {"days": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6})


def size(count: float) -> str:
    return shown(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3}) if count else "0"


def held(o, memory: float) -> str:
    return size(memory) + ("" if memory <= o.memory * 1e9 else ", does not fit")


def one_device(o, layers: list[Layer]) -> str:
    rows = []
    for layer in layers:
        found = [[on_devices(o, kind, layer, 1, name) for kind in KINDS] for name in PASSES]
        times = [duration(x["seconds"]) for one in found for x in one]
        rows.append([f"{layer.n:,}", *times, *(held(o, x["memory"]) for x in found[1][:2])])
    heads = [f"{name}, {label}" for name in ("forward", "forward + backward") for label in KINDS.values()]
    return table(["n", *heads, "memory, exact", "memory, multipole"], rows)


def many_devices(o, layers: list[Layer]) -> str:
    rows = []
    for layer in layers:
        for devices in o.devices:
            full, *own = (on_devices(o, kind, layer, devices, "both") for kind in KINDS)
            time = duration(full["seconds"]) + (" (waits for keys)" if full["waits"] else "")
            received = [size(x["received"]) for x in (full, *own)]
            rows.append([f"{layer.n:,}", f"{devices}", time, *(duration(x["seconds"]) for x in own)])
            rows[-1] += [f"{full['seconds'] / own[0]['seconds']:,.0f}", *received, duration(own[0]["travel"])]
            rows[-1] += [held(o, x["memory"]) for x in (full, *own)]
    heads = [*KINDS.values(), "exact over multipole", *(f"received, {label}" for label in KINDS.values()), "messages, multipole"]
    return table(["n", "GPUs", *heads, *(f"memory of a GPU, {label}" for label in KINDS.values())], rows)


def generation(o, layers: list[Layer]) -> str:
    rows = []
    for layer in layers:
        costs = [cost_model.decode(kind, layer) for kind in KINDS]
        shares = [o.share_full, o.share_multipole, o.share_multipole]
        times = [duration(cost.bytes / (o.bandwidth * 1e9) / share) for cost, share in zip(costs, shares)]
        rows.append([f"{layer.n:,}", *(size(cost.memory) for cost in costs), *times])
    heads = [f"{what}, {label}" for what in ("state", "reading it") for label in KINDS.values()]
    return table(["tokens behind", *heads], rows)


def reached(record: dict) -> dict:
    """Of each kind, the last shape that was timed: the time over its floor, by pass, and the rates meanwhile."""
    found = {}
    for kind, method in MEASURED.items():
        timed = [r for r in record["results"] if r["method"] == method and "samples" in r]
        if not timed:
            sys.exit(f"--measured has no times of {method}: run scripts.benchmarks.attention with --methods {' '.join(MEASURED.values())}")
        last = timed[-1]
        rates = next(x for x in record["rates"] if (x["n"], x["batch"]) == (last["n"], last["batch"]))
        over = {name: last[name]["median"] / max(last[f"{name}_floors"].values()) for name in PASSES}
        found[kind] = {"n": last["n"], "over": over, "rates": rates, "memory": last.get("memory")}
    return found


def on_processor(o, record: dict) -> str:
    options, shares = record["options"], reached(record)
    sizes = {name: options[name] for name in ("heads", "kv_heads", "head_dim", "block_size", "rank")}
    rows = []
    for n in o.lengths:
        layer, cells = Layer(n, **sizes), []
        for name, cost in PASSES.items():
            for kind, x in shares.items():
                least, rates = cost(kind, layer), x["rates"]
                cells.append(duration(x["over"][name] * max(least.flops / rates["gemm"], least.bytes / rates["copy"])))
        rows.append([f"{n:,}", *cells, size(cost_model.both("multipole", layer).memory)])
    heads = [f"{name}, {label}" for name in ("forward", "forward + backward") for label in KINDS.values()]
    times = table(["n", *heads, "extra memory, multipole"], rows)
    over = ", ".join(f"{KINDS[kind]} {x['over']['forward']:.2f} and {x['over']['both']:.2f} (at {x['n']:,})" for kind, x in shares.items())
    rates = shares["multipole"]["rates"]
    clock = "processor seconds" if options["clock"] == "processor" else "wall time"
    return f"""## The processor that was measured

{options["threads"]} threads ({clock}) of {record["machine"]["processor"]}, {sizes["heads"]} heads of {sizes["head_dim"]},
{options["dtype"]}, block size {sizes["block_size"]}, rank {sizes["rank"]}. Measured: {rates["gemm"] / 1e9:,.0f} Gflop/s of a matrix
product, {rates["copy"] / 1e9:,.1f} GB/s of a copy, and how many times its floor each method took, forward and forward + backward:
{over}. Derived: the floors at these lengths, times that.

```bash
{record["command"]}
```

{times}
"""


def report(o, layers: list[Layer], record: dict | None, picture: str) -> str:
    first, last, most = layers[0], layers[-1], o.devices[-1]
    ratio = on_devices(o, "full", first, 1, "both")["seconds"] / on_devices(o, "multipole", first, 1, "both")["seconds"]
    cost = cost_model.both("multipole", first)
    bound, gain = ("bytes", "nothing") if cost.flops / (o.tflops * 1e3) < cost.bytes / o.bandwidth else ("operations", "time")
    columns = [cost_model.pairs(kind, first) / first.n for kind in KINDS]
    received = [cost_model.exchange(kind, last, most, True)[0] for kind in ("full", "multipole")]
    measured = "" if record is None else "\n" + on_processor(o, record)
    return f"""# What attention of one layer costs past the lengths that were run

A plan on paper. One layer's attention, without projections: {first.heads} heads of {first.head_dim} on {first.kv_heads} key heads,
bfloat16, one row, block size {first.block_size}, rank {first.rank}, causal, hierarchical summaries.

```bash
{command()}
```

- **Derived**: operations, bytes, memory, states and messages, by `scripts/benchmarks/cost_model.py` from the definitions. Tests
  hold it against the interaction lists, against PyTorch's count of the products where there is one, and against tensors of the package.
- **Assumed**: {o.tflops:g} Tflop/s and {o.bandwidth:,g} GB/s a GPU and {o.memory:g} GB on it (the published figures of an H200, dense
  bfloat16), of which exact attention reaches {o.share_full:.0%} and multipole attention {o.share_multipole:.0%};
  {o.link:g} GB/s a GPU between the {o.node} of a node, {o.network:g} GB/s beyond, {o.latency:g} µs a message. Exact attention is ring
  attention that hides its messages behind the products and is balanced over devices; multipole attention waits for every message.
- **Measured**: nothing on a GPU{"" if record is None else "; the figures of the processor below, on far shorter rows"}.
- **Not implemented**: the package has no sequence parallelism. Each layer's attention runs on the device that holds the row; what follows
  for many devices says what such an implementation would have to move, not what this one does.

## One GPU

At {first.n:,} tokens a token has {columns[0]:,.0f} columns on average in exact attention, {columns[1]:,.0f} in multipole attention
and {columns[2]:,.0f} in the O(n) form. "Memory": q, k, v, the output, what is kept between the passes, and all gradients.

{one_device(o, layers)}

- At {first.n:,} tokens multipole attention is {ratio:,.0f} times faster under these shares: to be slower, it would have to reach less
  than {o.share_multipole / ratio:.3%} of a GPU's rates.
- The floor of multipole attention is set there by {bound}, so that fewer columns in the far field gain {gain}.
- What ends the lengths of one GPU is memory, which is that of the tokens in both.

## Many GPUs

Forward + backward. Ring attention sends all keys and values past every device, and in the backward pass once more with their gradients.
In multipole attention a device needs the last block of the part before it, and of each level (there are
{cost_model.level_count(last.n, last.block_size)} at {last.n:,} tokens) no more than four groups of {first.rank} summary keys and values,
in float32; in the O(n) form one far result a head more. Their gradients go back the same way.

{many_devices(o, layers)}

- At {last.n:,} tokens on {most} GPUs, each receives {size(received[0])} in exact attention and {size(received[1])} in
  multipole attention, whose messages take about the same time at every length: it is their number that costs.

![time of a layer, bytes that travel](images/{picture})

## Generation

The state of one layer and row, and the time to read it once, which a step takes at least. The package keeps states in float32.

{generation(o, layers)}
{measured}"""


def draw(o, layers: list[Layer], path: Path) -> None:
    lengths = [layer.n for layer in layers]
    with figure(path, 2, 1, (12, 4.8), "On paper, by counts of operations and bytes: nothing here was measured") as (_, ((left, right),)):
        for kind, colour in zip(KINDS, colours(KINDS.values()).values()):
            label = KINDS[kind]
            for devices, style in zip((o.devices[0], o.devices[-1]), ("o-", "o--")):
                times = [on_devices(o, kind, layer, devices, "both")["seconds"] for layer in layers]
                left.plot(lengths, times, style, color=colour, markersize=4, label=f"{label}, {devices} GPU{'s' * (devices > 1)}")
            received = [cost_model.exchange(kind, layer, o.devices[-1], True)[0] / 1e6 for layer in layers]
            if o.devices[-1] > 1:
                right.plot(lengths, received, "o-", color=colour, markersize=4, label=label)
        left.set(title="forward + backward of one layer, seconds")
        right.set(title=f"received by each of {o.devices[-1]} GPUs, MB")
        for axes in (left, right):
            axes.set(xscale="log", yscale="log", xlabel="tokens")
            axes.set_xticks(lengths, [f"{n / 2**20:g}M" for n in lengths])
            axes.grid(alpha=0.25)
            if axes.lines:
                label_ends(axes)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sizes = {"heads": 32, "kv-heads": 8, "head-dim": 128, "block-size": 64, "rank": 4, "node": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    rates = {
        "tflops": (989.0, "Tflop/s of a GPU"),
        "bandwidth": (4800.0, "GB/s of its memory"),
        "memory": (141.0, "GB of it"),
        "link": (450.0, "GB/s that a GPU receives from one of its node"),
        "network": (50.0, "GB/s that it receives from another node"),
        "latency": (10.0, "microseconds of a message"),
        "share-full": (0.6, "of these rates that exact attention reaches"),
        "share-multipole": (0.2, "that multipole attention reaches"),
    }
    for name, (default, what) in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what}; default: {default:g}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**20, 2**22, 2**24, 100 * 2**20])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--measured", type=Path, help="the JSON file of scripts/benchmarks/attention.py")
    parser.add_argument("--report", type=Path, default=Path("runs/cost/cost.md"), help="Markdown file, its picture under images/ beside it")
    o = parser.parse_args(arguments)
    o.lengths, o.devices = sorted(set(o.lengths)), sorted(set(o.devices))
    numbers = {name: min(x) if isinstance(x, list) else x for name, x in vars(o).items() if name not in ("measured", "report")}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if not x > 0]
    faults += [f"--{name.replace('_', '-')} {x} must be at most 1" for name, x in numbers.items() if "share" in name and x > 1]
    for large, small in () if faults else (("heads", "kv_heads"), ("block_size", "rank")):
        if getattr(o, large) % getattr(o, small):
            faults.append(f"--{small.replace('_', '-')} {getattr(o, small)} must divide --{large.replace('_', '-')} {getattr(o, large)}")
    for n in () if faults else o.lengths:
        for devices in o.devices:
            if n % (devices * o.block_size):
                faults.append(f"--lengths {n} cannot be cut into whole blocks of {o.block_size} for --devices {devices}")
    if o.measured and not o.measured.is_file():
        faults.append(f"--measured {o.measured} does not exist; scripts/benchmarks/attention.py writes it")
    if faults:
        sys.exit("\n".join(faults))
    return o


def main(arguments):
    o = parse(arguments)
    layers = [Layer(n, 1, o.heads, o.kv_heads, o.head_dim, 2, o.block_size, o.rank) for n in o.lengths]
    record = json.loads(o.measured.read_text()) if o.measured else None
    picture = o.report.parent / "images" / f"{o.report.stem}.png"
    text = report(o, layers, record, picture.name)
    picture.parent.mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib"):
        draw(o, layers, picture)
    o.report.write_text(text)
    print(f"wrote {o.report}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Times attention methods side by side: forward, forward + backward and extra peak memory against length and batch size.

    python -m scripts.benchmarks.attention --output runs/benchmark
    python -m scripts.benchmarks.attention --lengths 1024 4096 --methods sdpa multipole-hierarchical --repeats 3
    python -m scripts.benchmarks.attention --lengths 4096 --batch 1 2 4 8 16 32 --output runs/benchmark-batch
    python -m scripts.benchmarks.attention --lengths 1024 4096 16384 --tokens 32768       # as many rows as make up that many tokens
    python -m scripts.benchmarks.attention --device cuda --output runs/benchmark-gpu      # the kernels, bfloat16, some minutes

Methods take turns, one call of each a round, so that they share whatever else the machine does. Times are medians ± half the
interquartile range: wall time, or with --clock processor the seconds of all threads, which on a busy machine, with --threads 1, count
less of what others do. "x sdpa": how many times faster than scaled_dot_product_attention, of the same direction, in the same run. "x
floor": the time over that of the operations alone, as counted by cost_model.py, at the rate of a large matrix product in the same rounds;
"x bytes": over that of the bytes counted there at the rate of a copy. One over the lesser of the two is the share of what the machine can
do. "CPU": processor over wall time; under the number of threads, the machine was busy. Memory is what a forward and backward needs
above inputs, weights and incoming gradient: outputs, gradients and all between; "x least": over what the cost model has. On the CPU
(Linux) a fresh process compares its resident set before with the highest since, some MB less than that where a small warm-up left
room; on CUDA it is max_memory_allocated.

Multipole methods, and "near", their near field alone, are first checked against hf_multipole.reference, values and gradients; if one
is wrong, nothing is timed. "multipole-linear" is the O(n) form, with hierarchical summaries. Of peers.py, less projections, where
installed (extra "peers"): linear-attention sees all tokens through sums of products; local-attention those of the own and the previous
window of --block-size, which is the near field; h-transformer-1d means of groups, with blocks of --block-size at each level;
nystrom-attention 64 landmarks, bidirectional. (ALiBi is exact attention with a bias.)
On CUDA devices the multipole methods run the GPU kernels, "multipole-pytorch" is the hierarchical one without them, and "flex-window"
is PyTorch's compiled flex_attention to the last two blocks' width of tokens; the default is bfloat16, so that sdpa is flash attention.
A method has --max-seconds-per-method at each shape, and one call of each pass at least where they fit in. Where they would not it is
left out; exact attention is then scaled by n^2 and batch, and every cell that rests on that is marked ~.
Leaves benchmark.json, .md and .png in --output: the first belongs beside a report of the others.
"""

import argparse
import importlib
import multiprocessing
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from hf_multipole.modeling.multipole_attention import multipole_attention
from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary, MeanSummary
from hf_multipole.reference import multipole_attention_reference
from hf_multipole.training.figures import colours, figure, label_ends
from scripts.benchmarks import cost_model
from scripts.benchmarks.cost_model import Layer
from scripts.common import peers
from scripts.common.measuring import machine, spread_of, timed, yardsticks
from scripts.common.reports import command, table, write_beside

METHODS = {  # kind in cost_model.py, and whether causal
    "sdpa": ("full", True),
    "near": ("local", True),
    "multipole-mean": ("multipole", True),
    "multipole-direct": ("multipole", True),
    "multipole-hierarchical": ("multipole", True),
    "multipole-linear": ("multipole_linear", True),
    "multipole-pytorch": ("multipole", True),
    "flex-window": ("local", True),
    "linear-attention": ("linear", True),
    "local-attention": ("local", True),
    "h-transformer-1d": (None, True),
    "sdpa-bidirectional": ("full", False),
    "multipole-bidirectional": ("multipole", False),
    "nystrom-attention": ("nystrom", False),
}
MULTIPOLE = [method for method in METHODS if method == "near" or method.startswith("multipole")]
PACKAGES = {"h-transformer-1d": "h_transformer_1d", "local-attention": "local_attention", "nystrom-attention": "nystrom_attention"}
ON_CUDA = ("multipole-pytorch", "flex-window")
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
PASSES = {"forward": cost_model.forward, "both": cost_model.both}
EXACT = {True: "sdpa", False: "sdpa-bidirectional"}  # what a method is compared with


def flex_window(q, k, v, window):
    """PyTorch's own kernel for attention to the last ``window`` tokens."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    n = q.shape[2]
    mask = flex.create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, n, n, device=q.device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def make_inputs(o, layer):
    """Random q, k, v, and the gradient of the output."""
    torch.manual_seed(0)
    sizes, kind = (layer.heads, layer.kv_heads, layer.kv_heads, layer.heads), {"device": o.device, "dtype": o.torch_dtype}
    q, k, v, upstream = (torch.randn(layer.batch, size, layer.n, layer.head_dim, **kind) for size in sizes)
    return [x.requires_grad_() for x in (q, k, v)], upstream


def multipole_options(o, method, n, kv_heads):
    """Keyword arguments of multipole_attention, which the reference takes as well, and the summaries' weights."""
    learned = (kv_heads, o.head_dim)
    kinds = {"near": (MeanSummary,), "multipole-mean": (MeanSummary,), "multipole-direct": (DirectSummary, *learned, n)}
    kind, *sizes = kinds.get(method, (HierarchicalSummary, *learned))
    key, value = (kind(o.block_size, o.rank, *sizes).to(o.device, o.torch_dtype) for _ in range(2))
    options = {"block_size": o.block_size, "rank": o.rank, "key_summary": key, "value_summary": value}
    options |= {"downsample_queries": method == "multipole-linear", "max_levels": 0 if method == "near" else None}
    return options | {"causal": method != "multipole-bidirectional"}, [*key.parameters(), *value.parameters()]


def build(o, method, inputs):
    """The method as a function without arguments, and the tensors whose gradients it gives."""
    q, k, v = inputs
    (_, heads, n, dim), kv_heads, causal = q.shape, k.shape[1], METHODS[method][1]
    if method in MULTIPOLE:
        options, weights = multipole_options(o, method, n, kv_heads)
        backend = "torch" if method == "multipole-pytorch" else "auto"
        return lambda: multipole_attention(q, k, v, **options, backend=backend), [*inputs, *weights]
    if method == EXACT[causal]:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads), inputs
    if method == "flex-window":
        return flex_window(q, k, v, 2 * o.block_size), inputs
    # The others know no groups of heads.
    q, k, v = inputs = [x.detach().repeat_interleave(heads // x.shape[1], 1).requires_grad_() for x in inputs]
    if method == "linear-attention":
        return lambda: peers.linear(q, k, v, causal, dim**-0.5), inputs
    if method == "local-attention":
        return lambda: peers.local(q, k, v, causal, dim**-0.5, o.block_size), inputs
    shape = (n, heads, dim, causal, dim**-0.5, q.device)
    peer = peers.nystrom_module(*shape) if method == "nystrom-attention" else peers.h_transformer_1d_module(*shape, o.block_size)
    x = peers.side_by_side(q, k, v).detach().requires_grad_()
    return lambda: peers.by_head(peer(x), heads), [x]


def run(call, leaves, upstream, backward):
    if backward:
        return torch.autograd.grad(call(), leaves, upstream, allow_unused=True)  # short rows have fewer levels than weights
    with torch.no_grad():
        return call()


def verify(o, method):
    """Largest relative difference from the definition on a small shape: values, and gradients of inputs and weights."""
    host = argparse.Namespace(**vars(o) | {"device": "cpu"})
    inputs, upstream = make_inputs(host, Layer(5 * o.block_size + 3, 1, 1 if o.heads == o.kv_heads else 2, 1, o.head_dim))
    options, weights = multipole_options(host, method, inputs[0].shape[2], 1)
    for weight in weights:
        weight.data += 0.3 * weight.abs().mean() * torch.randn_like(weight)
    expected = multipole_attention_reference(*inputs, **options)
    wanted = [expected, *torch.autograd.grad(expected, [*inputs, *weights], upstream.double())]
    for summary in (options["key_summary"], options["value_summary"]):
        summary.to(o.device)
    inputs = [x.detach().to(o.device).requires_grad_() for x in inputs]
    backend = "torch" if method == "multipole-pytorch" else "auto"
    out = multipole_attention(*inputs, **options, backend=backend)
    got = [out, *torch.autograd.grad(out, [*inputs, *weights], upstream.to(o.device))]
    return torch.stack([(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in zip(got, wanted)]).max().item()


def peak_memory(o, method, layer):
    """Extra bytes of one forward and backward in this process, which on the CPU must be a fresh one."""
    cuda = torch.device(o.device).type == "cuda"

    def held(field):
        if cuda:
            return torch.cuda.memory_allocated(o.device) if field == "VmRSS" else torch.cuda.max_memory_allocated(o.device)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[field].split()[0]) * 1024

    for sizes in (layer._replace(n=4 * o.block_size, batch=1), layer):  # the small one loads libraries and starts threads
        inputs, upstream = make_inputs(o, sizes)
        call, leaves = build(o, method, inputs)
        torch.cuda.reset_peak_memory_stats(o.device) if cuda else Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = held("VmRSS")
        run(call, leaves, upstream, True)
        extra = held("VmHWM") - before
    return extra


def report_memory(pipe, *arguments):
    torch.set_num_threads(arguments[0].threads)
    try:
        pipe.send(peak_memory(*arguments))
    except Exception as error:
        pipe.send((str(error) or type(error).__name__).splitlines()[0])


def memory_in_new_process(o, method, layer):
    # Made from a process that has imported what this one has, and done nothing else.
    context = multiprocessing.get_context("forkserver")
    pipe, end = context.Pipe(duplex=False)
    process = context.Process(target=report_memory, args=(end, o, method, layer))
    process.start()
    end.close()
    try:
        found = pipe.recv()
    except EOFError:
        process.join()
        found = f"exit status {process.exitcode}"
    process.join()
    if isinstance(found, int):
        return found
    tqdm.write(f"{method}, {layer.batch} x {layer.n}: no memory figure: {found}")


def growth(kind, layer, earlier):
    """Of the time, from an earlier result on."""
    return (layer.n / earlier["n"]) ** (2 if kind == "full" else 1) * layer.batch / earlier["batch"]


def measure(o, layer, earlier, bar):
    """Adds all methods at one shape, in turns, to the earlier results; returns the rates of a matrix product and a copy meanwhile."""
    inputs, upstream = make_inputs(o, layer)
    results, calls, rounds, gemm, copies = {}, {}, {}, [], []
    for method in o.methods:
        bar.set_postfix_str(f"{layer.batch} x {layer.n}, first call of {method}")
        result = results[method] = {"method": method, "n": layer.n, "batch": layer.batch, "note": ""}
        before = [r for r in earlier if r["method"] == method and "samples" in r][-1:]
        guess = {name: r[name]["median"] * growth(METHODS[method][0], layer, r) for r in before for name in PASSES}
        if sum(guess.values()) > o.max_seconds_per_method:
            result["note"] = "left out, too slow"
            if METHODS[method][0] == "full":
                note = f"scaled by n^2 and batch from {before[0]['batch']} x {before[0]['n']:,}"
                result |= {name: {"median": x} for name, x in guess.items()} | {"note": note}
            continue
        try:
            calls[method] = build(o, method, inputs)
            first = {name: timed(o.device, run, *calls[method], upstream, name == "both") for name in PASSES}
        except (RuntimeError, MemoryError, AssertionError, ValueError) as error:
            calls.pop(method, None)
            result["note"] = f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        rounds[method] = min(o.repeats, int(o.max_seconds_per_method / sum(wall for wall, _ in first.values())) - 1)
        result["samples"] = {name: [] if rounds[method] > 0 else [sample] for name, sample in first.items()}
        if rounds[method] < 1:
            result["note"] = "the first call alone, which may be slower than later ones"
    bar.update(1)

    multiply, copy, flops, moved = yardsticks(o.device, o.torch_dtype)
    for i in range(o.repeats):
        gemm.append(timed(o.device, multiply)[o.clock == "processor"])
        copies.append(timed(o.device, copy)[o.clock == "processor"])
        for method in (method for method in calls if i < rounds[method]):
            bar.set_postfix_str(f"{layer.batch} x {layer.n}, {method}")
            for name, samples in results[method]["samples"].items():
                samples.append(timed(o.device, run, *calls[method], upstream, name == "both"))
        bar.update(1)
    rate, copied = flops / statistics.median(gemm), moved / statistics.median(copies)
    for method, result in results.items():
        kind, causal = METHODS[method]
        for name, samples in result.get("samples", {}).items():
            result[name] = spread_of(samples, o.clock)
        for name, cost in PASSES.items():
            exact = results.get(EXACT[causal], {})
            if name in result and name in exact:
                result[name]["speedup"] = exact[name]["median"] / result[name]["median"]
                result[name]["of_measured"] = "samples" in exact and "samples" in result
            if kind:
                least = cost(kind, layer, causal)
                result |= {"least_memory": least.memory}  # of both passes, the last
                result[f"{name}_floors"] = {"operations": least.flops / rate, "bytes": least.bytes / copied}
    earlier += results.values()
    return rate, copied


def markdown(o, results, rates):
    """The results; what follows from a time that was not run has a ~ in its cell."""
    each = ["x sdpa", "x floor", "x bytes"]
    clock = "processor ms" if o.clock == "processor" else "ms"
    head = ["n", "batch", "method", f"forward, {clock}", *each, f"forward + backward, {clock}", *each, "µs a token", "CPU"]
    rows = []
    for r in results:
        cells, guess = [f"{r['n']:,}", f"{r['batch']}", r["method"]], "" if "samples" in r else "~"
        for name in PASSES:
            x, floors = r.get(name, {}), r.get(f"{name}_floors", {})
            text = f"{guess}{x['median'] * 1e3:,.1f}" if x else "-"
            text += f" ±{x['spread'] / x['median']:.0%}" if len(r.get("samples", {}).get(name, ())) > 1 else ""
            over = [f"{guess}{x['median'] / floors[floor]:.3g}" if x and floor in floors else "" for floor in ("operations", "bytes")]
            cells += [text, f"{'' if x['of_measured'] else '~'}{x['speedup']:.3g}" if "speedup" in x else "", *over]
        cells.append(f"{guess}{a_token(r, 'both')[0]:.2f}" if "both" in r else "")
        cells.append(f"{r['both']['cpu']:.2f}" if "samples" in r else "")
        cells.append(f"{r['memory'] / 1e6:,.0f}" if r.get("memory") is not None else "")
        cells.append(f"{r['memory'] / r['least_memory']:.2f}" if r.get("memory") and "least_memory" in r else "")
        rows.append(cells)
    notes = [f"- {r['method']} at {r['batch']} x {r['n']:,}: {r['note']}" for r in results if r["note"]]
    at = [f"{x['gemm'] / 1e9:,.0f} Gflop/s and {x['copy'] / 1e9:,.1f} GB/s at {x['batch']} x {x['n']:,}" for x in rates]
    notes.append(f"- matrix product and copy: {', '.join(at)}")
    return "\n".join([table([*head, "extra memory, MB", "x least"], rows, 3), "", *notes])


def a_token(r, what):
    """Measured, and the cost model's floor, of one token: microseconds of a pass, or kilobytes of "memory"; None where there is none."""
    if what == "memory":
        unit, found = 1e3, (r.get("memory"), r.get("least_memory"))
    else:
        unit, found = 1e-6, (r.get(what, {}).get("median"), max(r.get(f"{what}_floors", {}).values(), default=None))
    return [None if x is None else x / unit / (r["batch"] * r["n"]) for x in found]


def draw(o, results, path):
    """Time and memory of a token against length, or against batch size where there is one length, and their floors beside them."""
    x_of = "n" if len({r["n"] for r in results}) > 1 else "batch"
    panels = {"forward": "forward, µs a token", "both": "forward + backward, µs a token", "memory": "extra memory, KB a token"}
    panels = {what: title for what, title in panels.items() if any(a_token(r, what)[0] is not None for r in results)}
    found = sorted({r[x_of] for r in results})
    rows = f"{o.tokens:,} tokens in all" if o.tokens else f"{found[0]} to {found[-1]} rows of {results[0]['n']:,} tokens"
    rows = f"batch {results[0]['batch']}" if x_of == "n" and not o.tokens else rows
    sizes = f"{o.heads} heads of {o.head_dim}, block size {o.block_size}, rank {o.rank}, {o.dtype}, {o.device}, {o.threads} threads"
    title = f"Attention of one layer: {rows}; {sizes}\nsolid: measured; dotted: extrapolated; dashed: least possible at the measured rates"
    with figure(path, len(panels), 1, (6.3 * len(panels), 5.6), title) as (_, (plots,)):
        for axes, (what, panel) in zip(plots, panels.items()):
            for method, colour in colours(o.methods).items():
                points = [(r[x_of], *a_token(r, what), "samples" in r) for r in results if r["method"] == method]
                points = [point for point in points if point[1] is not None]
                if points:
                    x, y, floors, measured = zip(*points)
                    style = {"color": colour, "linewidth": 2.4 if method == "multipole-hierarchical" else 1.4, "markersize": 4}
                    axes.plot(x, y, "o:", mfc="white", **style, label=("" if measured[-1] else "~") + method)
                    some = sum(measured)  # what is extrapolated comes last
                    axes.plot(x[:some], y[:some], "o-" if METHODS[method][1] else "s-", **style)
                    if floors[0] is not None:
                        axes.plot(x, floors, "--", color=colour, linewidth=0.9, alpha=0.8)
            axes.set(yscale="log", xlabel={"n": "tokens of a row", "batch": "rows"}[x_of], title=panel)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.25)
            label_ends(axes)


def parse(arguments):
    parser = argparse.ArgumentParser(description="Times attention methods side by side.", allow_abbrev=False)
    sizes = {"heads": 8, "head-dim": 64, "block-size": 64, "rank": 4, "repeats": 7, "threads": torch.get_num_threads()}
    for name, default in (sizes | {"max-seconds-per-method": 120.0}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows; each with each length; default: 1")
    parser.add_argument("--tokens", type=int, help="in place of --batch: at each length as many rows as have so many tokens together")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="which seconds; default: wall")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that are installed")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: float32; bfloat16 on CUDA devices")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    o = parser.parse_args(arguments)
    o.kv_heads = o.heads if o.kv_heads is None else o.kv_heads
    o.lengths, o.batch = sorted(set(o.lengths)), sorted(set(o.batch))
    o.dtype = o.dtype or ("bfloat16" if o.device == "cuda" else "float32")
    o.torch_dtype = getattr(torch, o.dtype)
    installed = [method for method in METHODS if method not in PACKAGES or find_spec(PACKAGES[method])]
    installed = [method for method in installed if method not in ON_CUDA or o.device == "cuda"]
    o.methods = [method for method in METHODS if method in (o.methods or installed)]
    numbers = {"lengths": o.lengths[0], "batch": o.batch[0]} | {name: x for name, x in vars(o).items() if type(x) in (int, float)}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if not x > 0]
    faults += [f"--methods {m} is not installed; pip install -e '.[peers]'" for m in o.methods if m in PACKAGES and m not in installed]
    faults += [f"--methods {m} needs --device cuda" for m in o.methods if m in ON_CUDA and m not in installed]
    for large, small in () if faults else (("heads", "kv_heads"), ("block_size", "rank")):
        if getattr(o, large) % getattr(o, small):
            faults.append(f"--{small.replace('_', '-')} {getattr(o, small)} must divide --{large.replace('_', '-')} {getattr(o, large)}")
    if o.tokens and o.batch != [1]:
        faults.append("--tokens and --batch exclude each other: --tokens says how many rows there are")
    faults += [f"--tokens {o.tokens} is no multiple of --lengths {n}" for n in o.lengths if o.tokens and not faults and o.tokens % n]
    if o.clock == "processor" and o.device == "cuda":
        faults.append("--clock processor is for --device cpu: the time of a CUDA device is that of its own events")
    if o.output.exists() and not o.output.is_dir():
        faults.append(f"--output {o.output} is a file; name a folder")
    try:
        torch.empty(1, device=o.device)
    except (RuntimeError, AssertionError) as error:
        faults.append(f"--device {o.device} cannot be used: {str(error).splitlines()[0]}")
    if faults:
        sys.exit("\n".join(faults))
    return o


def write(o, results, rates):
    """All that there is so far."""
    options = {name: x for name, x in vars(o).items() if isinstance(x, (int, float, str, list))}
    record = {"command": command(), "machine": machine(), "options": options, "rates": rates, "results": results}
    path = o.output / "benchmark.md"
    write_beside(path, record)
    path.write_text(f"    {command()}\n\n{markdown(o, results, rates)}\n")
    if find_spec("matplotlib"):
        draw(o, results, path.with_suffix(".png"))


def main(arguments):
    o = parse(arguments)
    torch.set_num_threads(o.threads)
    sizes = {"heads": o.heads, "kv_heads": o.kv_heads, "head_dim": o.head_dim, "block_size": o.block_size, "rank": o.rank}
    sizes |= {"itemsize": o.torch_dtype.itemsize, "chunk": peers.CHUNK, "landmarks": peers.LANDMARKS}
    o.output.mkdir(parents=True, exist_ok=True)
    for method in (method for method in o.methods if method in MULTIPOLE):
        error = verify(o, method)
        print(f"{method} differs from its definition by {error:.1e}", flush=True)
        if not error <= TOLERANCE[o.dtype]:
            sys.exit(f"{method} is wrong: nothing is timed")

    layers = [Layer(n, batch, **sizes) for n in o.lengths for batch in ([o.tokens // n] if o.tokens else o.batch)]
    results, rates = [], []
    with tqdm(total=len(layers) * (o.repeats + 1 + (not o.no_memory) * len(o.methods)), mininterval=1) as bar:
        for layer in layers:
            rate, copied = measure(o, layer, results, bar)
            rates.append({"n": layer.n, "batch": layer.batch, "gemm": rate, "copy": copied})
            write(o, results, rates)
        for result in [] if o.no_memory else results:
            layer = Layer(result["n"], result["batch"], **sizes)
            bar.set_postfix_str(f"{layer.batch} x {layer.n}, memory of {result['method']}")
            measured = peak_memory if o.device == "cuda" else memory_in_new_process
            result["memory"] = measured(o, result["method"], layer) if "samples" in result else None
            bar.update(1)
    write(o, results, rates)
    print(markdown(o, results, rates))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Times attention methods side by side: forward, forward + backward and extra peak memory against n.

    python scripts/benchmark.py --output runs/benchmark
    python scripts/benchmark.py --lengths 1024 4096 --methods sdpa multipole-hierarchical --repeats 3
    python scripts/benchmark.py --device cuda --output runs/benchmark-gpu      # the kernels, bfloat16, some minutes

Methods take turns, one call of each a round, so that they share whatever else the machine does. Times are medians ± half the
interquartile range. "x sdpa": how many times faster than causal scaled_dot_product_attention in the same run. "x floor": the time
over that of the multiply-adds alone (2 products forward, 6 in all, of the queries with the columns given to them) at the rate of a
large matrix product in the same rounds; "x bytes": over that of reading and writing every argument, result and gradient once at the
rate of a copy. One over the lesser of the two is the share of what the machine can do. "CPU": processor over wall time; under the
number of threads, the machine was busy.
Memory is what a forward and backward needs above inputs, weights and incoming gradient: outputs, gradients and all between. On the
CPU (Linux) a fresh process compares its resident set before with the highest since; on CUDA it is max_memory_allocated.
"multipole-linear" is the O(n) form, with hierarchical summaries.
Multipole methods and "near", the near field alone, are first checked against hf_multipole.reference, values and gradients; if one
is wrong, nothing is timed. h-transformer-1d and local-attention (window 128) run where installed (extra "peers"), less projections.
On CUDA devices the multipole methods run the GPU kernels, "multipole-pytorch" is the hierarchical one without them, and "flex-window"
is PyTorch's compiled flex_attention to the last two blocks' width of tokens; the default is bfloat16, so that sdpa is flash attention.
What would take more than --max-seconds-per-method at a length is left out; sdpa is then scaled by n^2, marked ~.
"""

import argparse
import importlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from hf_multipole.modeling.hierarchy import level_count, near_offsets
from hf_multipole.modeling.multipole_attention import multipole_attention
from hf_multipole.modeling.multipole_torch import block_attention
from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary, MeanSummary
from hf_multipole.reference import multipole_attention_reference

MULTIPOLE = (
    "multipole-mean",
    "multipole-direct",
    "multipole-hierarchical",
    "multipole-linear",
    "multipole-bidirectional",
    "multipole-pytorch",
)
PEERS = {"h-transformer-1d": "h_transformer_1d", "local-attention": "local_attention"}
ON_CUDA = ("multipole-pytorch", "flex-window")
METHODS = ("sdpa", "near", *MULTIPOLE, "flex-window", *PEERS)
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
PASSES = {"forward": 1, "both": 3}  # and their products, in forward passes
MOVED = {"forward": (2, 2), "both": (6, 6)}  # tensors of the size of q, and of k, that must be read or written


def near_attention(q, k, v, block_size):
    """Causal attention to the own and the previous block: the operator of multipole attention, without far columns."""
    (batch, heads, n, dim), kv_heads = q.shape, k.shape[1]
    q, k, v = (F.pad(x, (0, 0, 0, -n % block_size)).unflatten(2, (-1, block_size)) for x in (q, k, v))
    rows = q.unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(-1, heads // kv_heads * block_size, dim)
    far, listed, bias = q.new_zeros(0, dim), rows.new_zeros(len(rows), 0).long(), rows.new_zeros(len(rows), 1, 0)
    tokens = (x.reshape(-1, block_size, dim) for x in (k, v))
    out = block_attention(rows, *tokens, far, far, listed, bias, None, True, q.shape[2], dim**-0.5, None, 0.0, None)
    return out.view(batch, kv_heads, q.shape[2], -1, block_size, dim).transpose(2, 3).reshape(batch, heads, -1, dim)[:, :, :n]


def flex_window(q, k, v, window):
    """PyTorch's own kernel for attention to the last ``window`` tokens."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    n = q.shape[2]
    mask = flex.create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, n, n, device=q.device)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def make_inputs(o, n, heads, kv_heads):
    """Random q, k, v, and the gradient of the output."""
    torch.manual_seed(0)
    sizes, kind = (heads, kv_heads, kv_heads, heads), {"device": o.device, "dtype": o.torch_dtype}
    q, k, v, upstream = (torch.randn(o.batch, size, n, o.head_dim, **kind) for size in sizes)
    return [x.requires_grad_() for x in (q, k, v)], upstream


def multipole_options(o, method, n, kv_heads):
    """Keyword arguments of multipole_attention, which the reference takes as well, and the summaries' weights."""
    learned = (kv_heads, o.head_dim)
    kinds = {"near": (MeanSummary,), "multipole-mean": (MeanSummary,), "multipole-direct": (DirectSummary, *learned, n)}
    kind, *sizes = kinds.get(method, (HierarchicalSummary, *learned))
    key, value = (kind(o.block_size, o.rank, *sizes).to(o.device, o.torch_dtype) for _ in range(2))
    options = {"block_size": o.block_size, "rank": o.rank, "key_summary": key, "value_summary": value}
    options["downsample_queries"] = method == "multipole-linear"
    return options | {"causal": method != "multipole-bidirectional"}, [*key.parameters(), *value.parameters()]


def build(o, method, inputs):
    """The method as a function without arguments, and the tensors whose gradients it gives."""
    q, k, v = inputs
    heads, kv_heads, n = o.heads, o.kv_heads, q.shape[2]
    if method in MULTIPOLE:
        options, weights = multipole_options(o, method, n, kv_heads)
        backend = "torch" if method == "multipole-pytorch" else "auto"
        return lambda: multipole_attention(q, k, v, **options, backend=backend), [*inputs, *weights]
    if method == "sdpa":
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads), inputs
    if method == "flex-window":
        return flex_window(q, k, v, 2 * o.block_size), inputs
    if method == "near":
        return lambda: near_attention(q, k, v, o.block_size), inputs
    # The others know no groups of heads.
    q, k, v = inputs = [x.detach().repeat_interleave(heads // x.shape[1], 1).requires_grad_() for x in inputs]
    if method == "local-attention":
        local = importlib.import_module("local_attention").LocalAttention(128, causal=True, autopad=True, use_rotary_pos_emb=False)
        return lambda: local(q, k, v), inputs
    peer = importlib.import_module("h_transformer_1d.h_transformer_1d").CausalHAttention1D
    peer = peer(1, max_seq_len=1 << (n - 1).bit_length(), heads=heads, dim_head=o.head_dim, block_size=o.block_size).to(o.device)
    peer.to_qkv = peer.to_out = torch.nn.Identity()
    x = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2).detach().requires_grad_()
    return lambda: peer(x).unflatten(2, (heads, -1)).transpose(1, 2), [x]


def run(call, leaves, upstream, backward):
    if backward:
        return torch.autograd.grad(call(), leaves, upstream, allow_unused=True)  # short rows have fewer levels than weights
    with torch.no_grad():
        return call()


def verify(o, method):
    """Largest relative difference from the definition on a small shape: values, and gradients of inputs and weights."""
    host = argparse.Namespace(**vars(o) | {"batch": 1, "device": "cpu"})
    inputs, upstream = make_inputs(host, 5 * o.block_size + 3, 1 if o.heads == o.kv_heads else 2, 1)
    options, weights = multipole_options(host, method, inputs[0].shape[2], 1)
    for weight in weights:
        weight.data += 0.3 * weight.abs().mean() * torch.randn_like(weight)
    options |= {"far_bias": torch.full((inputs[0].shape[1], 1), -torch.inf)} if method == "near" else {}
    expected = multipole_attention_reference(*inputs, **options)
    wanted = [expected, *torch.autograd.grad(expected, [*inputs, *weights], upstream.double())]
    for summary in (options["key_summary"], options["value_summary"]):
        summary.to(o.device)
    inputs = [x.detach().to(o.device).requires_grad_() for x in inputs]
    backend = "torch" if method == "multipole-pytorch" else "auto"
    out = near_attention(*inputs, o.block_size) if method == "near" else multipole_attention(*inputs, **options, backend=backend)
    got = [out, *torch.autograd.grad(out, [*inputs, *weights], upstream.to(o.device))]
    return torch.stack([(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in zip(got, wanted)]).max().item()


def timed(device, work, *arguments):
    """Wall and processor seconds of one call; on CUDA the device's time, by events."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    if cuda:
        stop.record()
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return start.elapsed_time(stop) / 1e3 if cuda else wall, cpu


def peak_memory(o, method, n):
    """Extra bytes of one forward and backward in this process, which on the CPU must be a fresh one."""
    cuda = torch.device(o.device).type == "cuda"

    def held(field):
        if cuda:
            return torch.cuda.memory_allocated(o.device) if field == "VmRSS" else torch.cuda.max_memory_allocated(o.device)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[field].split()[0]) * 1024

    for length in (4 * o.block_size, n):  # the short one loads libraries and starts threads
        inputs, upstream = make_inputs(o, length, o.heads, o.kv_heads)
        call, leaves = build(o, method, inputs)
        torch.cuda.reset_peak_memory_stats(o.device) if cuda else Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = held("VmRSS")
        run(call, leaves, upstream, True)
        extra = held("VmHWM") - before
    return extra


def memory_in_new_process(arguments, method, n):
    done = subprocess.run([sys.executable, __file__, *arguments, "--memory-of", method, str(n)], capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    tqdm.write(f"{method} at {n}: no memory figure: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}")


def moved_bytes(o, n, name):
    """Every argument, result and gradient once: q, k, v, out; and backward all of them, with the gradients that come and go."""
    of_queries, of_keys = MOVED[name]
    return o.batch * n * o.head_dim * o.torch_dtype.itemsize * (of_queries * o.heads + of_keys * o.kv_heads)


def forward_flops(o, method, n):
    """Of the two products of all queries with the columns given to them."""
    sides = 2 if method == "multipole-bidirectional" else 1
    near = o.block_size * len(near_offsets(math.ceil(n / o.block_size), sides == 1))
    far = 2 * sides * o.rank * level_count(n, o.block_size) if method in MULTIPOLE else 0  # flex-window: as near
    if method == "multipole-linear":
        far = 4 * o.rank**2 / o.block_size  # at most: twice rank of a block's queries, all levels taken together
    return o.batch * o.heads * n * 4 * o.head_dim * ((n + 1) / 2 if method == "sdpa" else min(n, near + far))


def measure(o, n, earlier, bar):
    """Adds all methods at one length, in turns, to the earlier results; returns the rates of a matrix product and a copy meanwhile."""
    inputs, upstream = make_inputs(o, n, o.heads, o.kv_heads)
    results, calls, rounds, gemm, copies = {}, {}, {}, [], []
    for method in o.methods:
        bar.set_postfix_str(f"n = {n}, first call of {method}")
        result = results[method] = {"method": method, "n": n, "note": ""}
        before = [r for r in earlier if r["method"] == method and "samples" in r][-1:]
        growth = (n / before[0]["n"]) ** (2 if method == "sdpa" else 1) if before else 0
        guess = {name: r[name]["median"] * growth for r in before for name in PASSES}
        if 2 * sum(guess.values()) > o.max_seconds_per_method:  # the first call and one round
            result["note"] = "left out, too slow"
            if method == "sdpa":
                result |= {name: {"median": x} for name, x in guess.items()} | {"note": f"scaled by n^2 from {before[0]['n']:,}"}
            continue
        try:
            calls[method] = build(o, method, inputs)
            spent = sum(timed(o.device, run, *calls[method], upstream, name == "both")[0] for name in PASSES)
        except (RuntimeError, MemoryError, AssertionError) as error:
            calls.pop(method, None)
            result["note"] = f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        rounds[method] = max(1, min(o.repeats, int(o.max_seconds_per_method / spent) - 1))
        result["samples"] = {name: [] for name in PASSES}
    bar.update(1)

    size = 1024 if torch.device(o.device).type == "cpu" else 8192
    matrix = torch.randn(size, size, device=o.device, dtype=o.torch_dtype)
    source, target = torch.zeros(2, 2**26, device=o.device, dtype=torch.uint8)  # more than caches hold
    for i in range(o.repeats):
        gemm.append(timed(o.device, torch.mm, matrix, matrix)[0])
        copies.append(timed(o.device, target.copy_, source)[0])
        for method in (method for method in calls if i < rounds[method]):
            bar.set_postfix_str(f"n = {n}, {method}")
            for name, samples in results[method]["samples"].items():
                samples.append(timed(o.device, run, *calls[method], upstream, name == "both"))
        bar.update(1)
    rate = 2 * len(matrix) ** 3 / sorted(gemm)[len(gemm) // 2]
    copied = 2 * source.nbytes / sorted(copies)[len(copies) // 2]
    for method, result in results.items():
        for name, samples in result.get("samples", {}).items():
            wall, cpu = torch.tensor(samples, dtype=torch.float64).unbind(1)
            low, median, high = wall.quantile(wall.new_tensor([0.25, 0.5, 0.75])).tolist()
            result[name] = {"median": median, "spread": (high - low) / 2, "cpu": (cpu.sum() / wall.sum()).item()}
        for name in PASSES:
            if name in result and method not in PEERS:
                result[name]["floor"] = forward_flops(o, method, n) * PASSES[name] / rate
                result[name]["bytes"] = moved_bytes(o, n, name) / copied
            if name in result and name in results.get("sdpa", {}):
                result[name]["speedup"] = results["sdpa"][name]["median"] / result[name]["median"]
    earlier += results.values()
    return rate, copied


def table(results, rates):
    """The results in Markdown."""
    each = "x sdpa | x floor | x bytes"
    lines = [f"| n | method | forward, ms | {each} | forward + backward, ms | {each} | CPU | extra memory, MB |"]
    lines.append("|---:|---|" + "---:|" * 10)
    for r in results:
        cells = [f"{r['n']:,}", r["method"]]
        for name in PASSES:
            x = r.get(name, {})
            text = f"{'' if 'spread' in x else '~'}{x['median'] * 1e3:,.1f}" if x else "-"
            text += f" ±{x['spread'] / x['median']:.0%}" if "spread" in x else ""
            floors = [f"{x['median'] / x[floor]:.3g}" if floor in x else "" for floor in ("floor", "bytes")]
            cells += [text, f"{x['speedup']:.3g}" if "speedup" in x else "", *floors]
        cells.append(f"{r['both']['cpu']:.2f}" if "samples" in r else "")
        cells.append(f"{r['memory'] / 1e6:,.0f}" if r.get("memory") is not None else "")
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {r['method']} at {r['n']:,}: {r['note']}" for r in results if r["note"]]
    at = ", ".join(f"{rate / 1e9:,.0f} Gflop/s and {copied / 1e9:,.0f} GB/s at {n:,}" for n, (rate, copied) in rates.items())
    notes.append(f"- matrix product and copy: {at}")
    return "\n".join([*lines, "", *notes])


def draw(o, results, path):
    """Time and memory against n."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 5.2))
    left, right = picture.subplots(1, 2)
    time_of, memory_of = lambda r: r.get("both", {}).get("median"), lambda r: (r.get("memory") or 0) / 1e6
    for axes, value, title, ends in (left, time_of, "forward + backward, seconds", []), (right, memory_of, "extra memory, MB", []):
        for i, method in enumerate(o.methods):
            points = [(r["n"], value(r), "samples" in r) for r in results if r["method"] == method and value(r)]
            if points:
                style = {"color": f"C{i}", "linewidth": 2.6 if method == "multipole-hierarchical" else 1.4, "markersize": 4}
                axes.plot(*zip(*(point[:2] for point in points)), "o--", mfc="white", **style)
                axes.plot(*zip(*(point[:2] for point in points if point[2])), "o-", **style)
                ends.append((points[-1][1], points[-1][0], method + ("" if points[-1][2] else " (dashed: scaled)"), f"C{i}"))
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title, xticks=o.lengths, xticklabels=[f"{n:,}" for n in o.lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        # A label beside the end of each line, pushed up where it would cover the one below.
        (low, high), place = map(math.log, axes.get_ylim()), -math.inf
        for y, n, label, color in sorted(ends):
            place = max((math.log(y) - low) / (high - low), place + 0.048)
            leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)}
            axes.annotate(label, (n, y), (1.04, place), "data", "axes fraction", leader, False, color=color, va="center", fontsize=9)
    picture.suptitle(f"{o.heads} heads of {o.head_dim}, block size {o.block_size}, rank {o.rank}, {o.dtype}, {o.device}")
    picture.tight_layout()
    picture.savefig(path, dpi=130)


def parse(arguments):
    parser = argparse.ArgumentParser(description="Times attention methods side by side.", allow_abbrev=False)
    sizes = {"batch": 1, "heads": 8, "head-dim": 64, "block-size": 64, "rank": 4, "repeats": 7, "threads": torch.get_num_threads()}
    for name, default in (sizes | {"max-seconds-per-method": 60.0}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that are installed")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: float32; bfloat16 on CUDA devices")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    o.kv_heads = o.heads if o.kv_heads is None else o.kv_heads
    o.lengths = sorted(set(o.lengths))
    o.dtype = o.dtype or ("bfloat16" if o.device == "cuda" else "float32")
    o.torch_dtype = getattr(torch, o.dtype)
    installed = [method for method in METHODS if method not in PEERS or find_spec(PEERS[method])]
    installed = [method for method in installed if method not in ON_CUDA or o.device == "cuda"]
    o.methods = [method for method in METHODS if method in (o.methods or installed)]
    numbers = {"lengths": o.lengths[0]} | {name: x for name, x in vars(o).items() if type(x) in (int, float)}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if not x > 0]
    faults += [f"--methods {m} is not installed; pip install -e '.[peers]'" for m in o.methods if m in PEERS and m not in installed]
    faults += [f"--methods {m} needs --device cuda" for m in o.methods if m in ON_CUDA and m not in installed]
    for large, small in () if faults else (("heads", "kv_heads"), ("block_size", "rank")):
        if getattr(o, large) % getattr(o, small):
            faults.append(f"--{small.replace('_', '-')} {getattr(o, small)} must divide --{large.replace('_', '-')} {getattr(o, large)}")
    if o.output.exists() and not o.output.is_dir():
        faults.append(f"--output {o.output} is a file; name a folder")
    try:
        torch.empty(1, device=o.device)
    except (RuntimeError, AssertionError) as error:
        faults.append(f"--device {o.device} cannot be used: {str(error).splitlines()[0]}")
    if faults:
        sys.exit("\n".join(faults))
    return o


def machine(o):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")] or [platform.processor()]
    gpu = torch.cuda.get_device_name(o.device) if torch.device(o.device).type == "cuda" else None
    versions = {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    return {"processor": names[0], "cores": os.cpu_count(), "gpu": gpu, "load": os.getloadavg()} | versions


def main(arguments):
    o = parse(arguments)
    torch.set_num_threads(o.threads)
    if o.memory_of:  # a process of its own, below
        return print(peak_memory(o, o.memory_of[0], int(o.memory_of[1])))
    o.output.mkdir(parents=True, exist_ok=True)
    for method in (method for method in o.methods if method in ("near", *MULTIPOLE)):
        error = verify(o, method)
        print(f"{method} differs from its definition by {error:.1e}", flush=True)
        if not error <= TOLERANCE[o.dtype]:
            sys.exit(f"{method} is wrong: nothing is timed")

    results, rates = [], {}
    with tqdm(total=len(o.lengths) * (o.repeats + 1 + (not o.no_memory) * len(o.methods)), mininterval=1) as bar:
        for n in o.lengths:
            rates[n] = measure(o, n, results, bar)
        for result in [] if o.no_memory else results:
            method, n = result["method"], result["n"]
            bar.set_postfix_str(f"n = {n}, memory of {method}")
            measured = peak_memory if o.device == "cuda" else memory_in_new_process
            result["memory"] = measured(o if o.device == "cuda" else arguments, method, n) if "samples" in result else None
            bar.update(1)
    print(text := table(results, rates))
    command, options = shlex.join(["python", *sys.argv]), {name: x for name, x in vars(o).items() if isinstance(x, (int, float, str, list))}
    record = {
        "command": command,
        "machine": machine(o),
        "options": options,
        "gemm_flops_and_copied_bytes_per_second": rates,
        "results": results,
    }
    (o.output / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n")
    (o.output / "benchmark.md").write_text(f"    {command}\n\n{text}\n")
    if find_spec("matplotlib"):
        draw(o, results, o.output / "benchmark.png")


if __name__ == "__main__":
    main(sys.argv[1:])

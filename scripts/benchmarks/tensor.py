"""Times tensor attention of order 3 against a dense einsum form and against the rate of a large matrix product.

    python -m scripts.benchmarks.tensor --output runs/benchmark-tensor
    python -m scripts.benchmarks.tensor --lengths 256 --window-lengths 2048 --polynomial-lengths 1024 --repeats 3
    python -m scripts.benchmarks.tensor --device cuda --output runs/benchmark-tensor-gpu

Three parts, each with causal attention unless it says otherwise: "exact", with a score and value width of --head-dim; "window", the
same with --window; "polynomial", with a score width of --score-dim and values of the same width, entries within 1 and scale
1 / --score-dim, so that scores lie within 1, against the exact path on the same tensors up to --exact-up-to tokens.
Cases of a part and length take turns, one call of each a round, with a matrix product in between, so that they share whatever
else the machine does. Times are medians ± half the interquartile range. "x forward": forward and backward over forward. "rate":
useful operations (4 * dim for each pair that a query sees) a second, over those of a 1024 x 1024 matrix product in the same rounds.
"CPU": processor over wall time; under the number of threads, the machine was busy. With --device cuda the GPU kernels are timed,
each beside the PyTorch path, in bfloat16 with 64 query heads on one key head of width 128, the ratio of arXiv 2507.02754. Before
anything is timed, every case is compared with hf_multipole.reference on a small shape, values and gradients; the polynomial's
output with its certificate.
"""

import argparse
import math
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_multipole import tensor_attention
from hf_multipole.modeling.polynomial_attention import feature_count
from hf_multipole.reference import tensor_attention_reference
from hf_multipole.training.figures import colours, figure, label_ends
from scripts.common.measuring import machine, spread_of, timed
from scripts.common.reports import command, table, write_beside

PASSES = ("forward", "both")
PUBLISHED = (
    "published, windowed forward, bfloat16, H100, in the same operations: up to 337 Tflop/s by the Triton kernels of arXiv 2507.02754, "
    "up to 588 by those of pytorch.org/blog/fast-2-simplicial-attention-hardware-efficient-kernels-in-tlx"
)


def dense(q, keys, values, *, causal, scale=None, window=None):
    """All scores at once: what a few lines of einsum do, in n ** 3 memory."""
    scores = torch.einsum("bhic,bhjc,bhkc->bhijk", q, *keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    token = torch.arange(q.shape[2], device=q.device)
    distance = token[:, None] - token
    first, second = ((distance < (w or len(token))) & ((distance >= 0) if causal else True) for w in window or (None, None))
    scores = scores.masked_fill(~(first[:, :, None] & second[:, None]), -torch.inf)
    weights = scores.flatten(3).softmax(-1).view_as(scores)
    return torch.einsum("bhijk,bhjc,bhkc->bhic", weights, *values)


def make_inputs(o, n, heads, kv_heads, dim, entries=None, seed=0):
    """q, two keys, two values, and the gradient of the output; entries of q and keys uniform within a bound, or normal."""
    torch.manual_seed(seed)

    def make(heads, entries=None):
        x = torch.randn(1, heads, n, dim) if entries is None else (torch.rand(1, heads, n, dim) * 2 - 1) * entries
        return x.to(o.device, getattr(torch, o.dtype))

    tensors = make(heads, entries), *(make(kv_heads, entries) for _ in range(2)), *(make(kv_heads) for _ in range(2))
    return [x.requires_grad_() for x in tensors], make(heads)


def pairs(n, causal, window):
    """Pairs of tokens seen by all queries together."""
    if not causal:
        return n**3
    return sum(math.prod(min(i, w or n) for w in window or (None, None)) for i in range(1, n + 1))


def cases(o, part, n):
    """Name, function, options of each case of a part; on a GPU, each is followed by the same on the PyTorch path."""
    found = own_cases(o, part, n)
    if o.device == "cpu":
        return found
    paths = ("", {"backend": "triton"}), (", PyTorch path", {"backend": "torch"})
    return [(name + path, function, options | backend) for name, function, options in found for path, backend in paths]


def own_cases(o, part, n):
    if part == "exact":
        found = [("causal", tensor_attention, {"causal": True}), ("bidirectional", tensor_attention, {"causal": False})]
        if o.device == "cpu" and n <= o.dense_up_to:
            found += [("causal, einsum", dense, {"causal": True}), ("bidirectional, einsum", dense, {"causal": False})]
        return found
    if part == "window":
        return [("causal", tensor_attention, {"causal": True, "window": tuple(o.window)})]
    scale = {"scale": 1 / o.score_dim}
    near = scale | {"method": "polynomial", "degree": o.degree, "entry_bound": 1.0}
    found = [(name, tensor_attention, near | {"causal": causal}) for name, causal in (("causal", True), ("bidirectional", False))]
    if n <= o.exact_up_to:
        found += [(f"{name}, exact path", tensor_attention, scale | {"causal": name == "causal"}) for name in ("causal", "bidirectional")]
    return found


def run(function, inputs, upstream, options, backward):
    q, k1, k2, v1, v2 = inputs
    if backward:
        return torch.autograd.grad(function(q, [k1, k2], [v1, v2], **options), inputs, upstream)
    with torch.no_grad():
        return function(q, [k1, k2], [v1, v2], **options)


def verify(o):
    """Stops where a case differs from the reference: float32 against float64, by more than sums of this size round."""
    for part in ("exact", "window", "polynomial"):
        inputs, upstream = make_inputs(o, 20, 2, 1, o.score_dim, entries=1.0)
        leaves = [x.detach().cpu().requires_grad_() for x in inputs]
        q, k1, k2, v1, v2 = leaves
        for name, function, options in cases(o, part, 1):
            kept = {key: value for key, value in options.items() if key in ("causal", "window", "scale")}
            exact = tensor_attention_reference(q, [k1, k2], [v1, v2], **kept)
            wanted = [exact, *torch.autograd.grad(exact, leaves, upstream.cpu().double())]
            got = [x.cpu() for x in (run(function, inputs, None, options, False), *run(function, inputs, upstream, options, True))]
            error = [(a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, wanted)]
            allowed = max(1e-4, 4 * torch.finfo(upstream.dtype).eps)
            if options.get("method") == "polynomial":
                _, certificate = tensor_attention(q, [k1, k2], [v1, v2], **options, return_certificate=True)
                if not ((got[0].double() - exact).abs() <= certificate.error).all():
                    sys.exit(f"{part}, {name}: the output is farther from the exact one than its certificate says: nothing is timed")
                allowed = max(allowed, 20 * certificate.delta)
            print(f"{part}, {name}: output differs from its definition by {error[0]:.1e}, gradients by {max(error[1:]):.1e}", flush=True)
            if not max(error) <= allowed:
                sys.exit(f"{part}, {name}: wrong: nothing is timed")


def measure(o, part, n, bar):
    """All cases of a part at one length, in turns."""
    dim = o.score_dim if part == "polynomial" else o.head_dim
    inputs, upstream = make_inputs(o, n, o.heads, o.kv_heads, dim, 1.0 if part == "polynomial" else None)
    matrix, products = torch.randn(o.matrix, o.matrix).to(upstream), []
    entries = [(name, {"forward": [], "both": []}, function, options) for name, function, options in cases(o, part, n)]
    for i in range(o.repeats + 1):
        for name, samples, function, options in entries:
            for which in PASSES:
                bar.set_postfix_str(f"{part}, n = {n}, {name}")
                product = timed(o.device, torch.mm, matrix, matrix)[0]
                sample = timed(o.device, run, function, inputs, upstream, options, which == "both")
                if i:  # the first round warms up
                    samples[which].append(sample)
                    products.append(product)
        bar.update(1)
    rate = 2 * len(matrix) ** 3 / statistics.median(products)
    results = []
    for name, samples, _, options in entries:
        result = {"part": part, "n": n, "case": name} | {which: spread_of(samples[which]) for which in PASSES}
        if options.get("method") != "polynomial":
            useful = o.heads * 4 * dim * pairs(n, options["causal"], options.get("window"))
            result["flops_per_second"] = useful / result["forward"]["median"]
            result["rate"] = result["flops_per_second"] / rate
        results.append(result)
    for result in results:
        # The einsum form and the exact path are what the others are compared with.
        other = [r for r in results if r["case"].startswith(result["case"] + ", ")]
        if other:
            result["speedup"] = {which: other[0][which]["median"] / result[which]["median"] for which in PASSES}
    return results, rate


def markdown(o, results, rates):
    """The results, and notes."""
    other = "einsum or exact path" if o.device == "cpu" else "PyTorch path"
    head = ["part", "n", "case", "forward, ms", "forward + backward, ms", "x forward", "Gflop/s", "rate", f"faster than {other}", "CPU"]
    rows = []
    for r in results:
        cells = [r["part"], f"{r['n']:,}", r["case"]]
        cells += [f"{r[which]['median'] * 1e3:,.1f} ±{r[which]['spread'] / r[which]['median']:.0%}" for which in PASSES]
        cells.append(f"{r['both']['median'] / r['forward']['median']:.2f}")
        cells += [f"{r['flops_per_second'] / 1e9:,.0f}", f"{r['rate']:.2f}"] if "rate" in r else ["", ""]
        cells.append(" / ".join(f"{r['speedup'][which]:.3g}" for which in PASSES) if "speedup" in r else "")
        rows.append([*cells, f"{r['both']['cpu']:.2f}"])
    features = feature_count(o.score_dim, o.degree)
    notes = [
        f"- {o.device}, {o.dtype}, {o.threads} threads; heads: {o.heads} on {o.kv_heads} of keys; exact and window: width {o.head_dim}, "
        f"window {tuple(o.window)}; "
        f"polynomial: width {o.score_dim}, degree {o.degree}, {features} features",
        f"- matrix product: {', '.join(f'{rate / 1e9:.0f} Gflop/s ({part}, {n:,})' for (part, n), rate in rates.items())}",
    ]
    if o.device == "cuda":
        notes.append(f"- {PUBLISHED}")
    return "\n".join([table(head, rows, 3), "", *notes])


def draw(results, path):
    """Time against n: one line a part and case."""
    lines = {f"{r['part']}: {r['case']}": [] for r in results}
    for r in results:
        lines[f"{r['part']}: {r['case']}"].append((r["n"], r["forward"]["median"]))
    # The same words with another meaning elsewhere: here "exact" is tensor attention, and einsum what it is compared with.
    own = [name for name in lines if "einsum" not in name and not (name.startswith("polynomial") and "path" not in name)]
    methods = {name: f"tensor {name}" if name in own else name for name in lines}
    shades = colours(methods.values())
    with figure(path, size=(9, 5.2)) as (_, ((axes,),)):
        for name, points in lines.items():
            axes.plot(*zip(*points), "o-", color=shades[methods[name]], markersize=4, label=name)
        axes.set(yscale="log", xlabel="tokens of a row", ylabel="seconds", title="Tensor attention of order 3: one forward pass")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
        label_ends(axes)


def parse(arguments):
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="which other defaults depend on")
    gpu = device.parse_known_args(arguments)[0].device == "cuda"
    parser = argparse.ArgumentParser(description="Times tensor attention.", allow_abbrev=False, parents=[device])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if gpu else "float32")
    sizes = {"heads": 64 if gpu else 1, "head-dim": 128 if gpu else 64, "matrix": 8192 if gpu else 1024}
    sizes |= {"score-dim": 8, "degree": 4, "dense-up-to": 256, "exact-up-to": 1024, "repeats": 20 if gpu else 5}
    for name, default in (sizes | {"threads": torch.get_num_threads()}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    lengths = {"lengths": [256, 512, 1024], "window-lengths": [2048, 16384], "polynomial-lengths": [1024, 8192, 65536]}
    for name, default in lengths.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=default, help=f"default: {default}")
    parser.add_argument("--kv-heads", type=int, help="default: 1 on a GPU, else as many as --heads")
    parser.add_argument("--window", type=int, nargs=2, default=[32, 512])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-tensor"))
    o = parser.parse_args(arguments)
    if o.kv_heads is None:
        o.kv_heads = 1 if gpu else o.heads
    texts = "output", "device", "dtype"
    numbers = {name: min(x) if isinstance(x, list) else x for name, x in vars(o).items() if name not in texts and x != []}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if not x > 0]
    if o.output.exists() and not o.output.is_dir():
        faults.append(f"--output {o.output} is a file; name a folder")
    if not faults and o.heads % o.kv_heads:
        faults.append(f"--kv-heads {o.kv_heads} does not divide --heads {o.heads}")
    if gpu and not torch.cuda.is_available():
        faults.append("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if faults:
        sys.exit("\n".join(faults))
    return o


def main(arguments):
    o = parse(arguments)
    torch.set_num_threads(o.threads)
    o.output.mkdir(parents=True, exist_ok=True)
    verify(o)
    lengths = {"exact": o.lengths, "window": o.window_lengths, "polynomial": o.polynomial_lengths}
    todo = [(part, n) for part, several in lengths.items() for n in sorted(set(several))]
    results, rates = [], {}
    with tqdm(total=len(todo) * (o.repeats + 1), mininterval=1) as bar:
        for part, n in todo:
            found, rates[part, n] = measure(o, part, n, bar)
            results += found
    print(text := markdown(o, results, rates))
    options = {name: x for name, x in vars(o).items() if isinstance(x, (int, list, str))}
    gemm = {f"{part} {n}": rate for (part, n), rate in rates.items()}
    record = {"command": command(), "machine": machine(), "options": options, "gemm_flops_per_second": gemm, "results": results}
    write_beside(o.output / "benchmark-tensor.md", record)
    (o.output / "benchmark-tensor.md").write_text(f"    {command()}\n\n{text}\n")
    if find_spec("matplotlib"):
        draw(results, o.output / "benchmark-tensor.png")


if __name__ == "__main__":
    main(sys.argv[1:])

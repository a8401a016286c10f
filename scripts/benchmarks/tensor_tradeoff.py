"""Shows where near-linear tensor attention stops paying: degree, features, time and break-even length by entry bound B and order.

    python -m scripts.benchmarks.tensor_tradeoff --output runs/tensor-tradeoff --report model_cards/reports/tensor-tradeoff.md
    python -m scripts.benchmarks.tensor_tradeoff --orders 3 --bounds 1 --tuples 4096 --numbers 4096 --repeats 1

Queries and keys have --score-dim entries within B and scale 1 / --score-dim, as in the theorem (arXiv 2310.04064), so that scores of
order k lie within B^k; values have --value-dim entries. Each bound gets the least degree whose relative error of the weights, delta,
is at most --tolerance, in float32, or in float64 where the certificate of float32 adds more than that in rounding.
Timed are forward passes of one row and one head: the exact path, in float32, on up to --tuples tuples of tokens; the polynomial of
each degree on two lengths, up to --numbers features in all. All take turns, one call each a round; times are processor seconds of one
thread, which do not count what else a shared machine does, medians. To both a law is fitted, exact: a + b n + c tuples, polynomial:
a + b n; the polynomial pays above the length at which they cross.
Before anything is timed, every polynomial is compared with hf_multipole.reference: its output must lie within its certificate.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_multipole import tensor_attention
from hf_multipole.modeling.polynomial_attention import (
    MAX_DEGREE,
    MAX_FEATURES,
    BoundViolation,
    feature_count,
    minimax_exponential,
)
from hf_multipole.reference import tensor_attention_reference
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.figures import figure
from scripts.common.measuring import machine, timed
from scripts.common.reports import command, table, write_beside

KINDS = ("causal", "bidirectional")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LAST = 16  # degree up to which float64 holds the coefficients at a tolerance of 1e-3 and more
FARTHEST = 10**12  # tokens; a polynomial that does not pay there never does
LINE = [lambda n: 1.0, float]


# Which polynomials there are


@functools.lru_cache
def largest_score(degree, tolerance):
    """The largest R for which the polynomial of that degree has a relative error within the tolerance on [-R, R]."""
    low, high = 0.0, 80.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if minimax_exponential(degree, middle)[1] <= tolerance else (low, middle)
    return low


def certified(o, order, bound, degree, dtype):
    """delta, and the bound on the error of an output whose products of values lie within 1, rounding included."""
    one = torch.ones(1, 1, 1, 1, dtype=DTYPES[dtype])
    ends = torch.cat([-one, one], 2)
    options = options_of(o, bound, degree) | {"causal": False}
    query, keys = torch.zeros(1, 1, 2, o.score_dim, dtype=DTYPES[dtype]), [torch.zeros(1, 1, 2, o.score_dim, dtype=DTYPES[dtype])]
    _, found = tensor_attention(query, keys * (order - 1), [ends] * (order - 1), **options, return_certificate=True)
    return found.delta, found.error.item()


def options_of(o, bound, degree):
    return {"method": "polynomial", "scale": 1 / o.score_dim, "entry_bound": bound, "degree": degree}


def ladder(o, order):
    """Every degree that can be used at this order: the largest bound that it serves, its features, and the dtype it needs."""
    steps = []
    for degree in range(MAX_DEGREE + 1):
        features, bound = feature_count(o.score_dim, degree), largest_score(degree, o.tolerance) ** (1 / order)
        if features > MAX_FEATURES or steps and bound <= steps[-1]["bound"]:
            break
        for dtype in DTYPES:
            try:
                delta, error = certified(o, order, bound, degree, dtype)
            except BoundViolation:
                continue
            if error - delta / (1 - delta) <= o.tolerance:
                steps.append({"order": order, "degree": degree, "bound": bound, "features": features, "dtype": dtype})
                break
    return steps


def cell(o, steps, order, bound):
    """A bound of the sweep: its polynomial, or why there is none."""
    found = {"order": order, "bound": bound, "scores": bound**order}
    step = next((step for step in steps if bound <= step["bound"]), None)
    if step:
        delta, error = certified(o, order, bound, step["degree"], step["dtype"])
        return found | {name: step[name] for name in ("degree", "features", "dtype")} | {"delta": delta, "error": error}
    if found["scores"] > 80:
        return found | {"reason": "scores beyond 80 are refused: exp overflows in float32 at 89"}
    deltas = [minimax_exponential(degree, found["scores"])[1] for degree in range(MAX_DEGREE + 1)]
    degree = next((degree for degree, delta in enumerate(deltas) if delta <= o.tolerance), None)
    if degree is None:
        return found | {"reason": f"delta is {min(deltas):.3g} even at degree {MAX_DEGREE}"}
    return found | {"reason": f"degree {degree} has {feature_count(o.score_dim, degree):,} features, more than {MAX_FEATURES:,}"}


# Times


def make_inputs(o, order, n, bound, dtype):
    torch.manual_seed(0)
    q, *keys = ((torch.rand(1, 1, n, o.score_dim, dtype=DTYPES[dtype]) * 2 - 1) * bound for _ in range(order))
    return q, keys, [torch.rand(1, 1, n, o.value_dim, dtype=DTYPES[dtype]) * 2 - 1 for _ in keys]


def verify(o, steps):
    """Stops where an output is farther from the reference, in float64, than its certificate says."""
    for step, kind in itertools.product(steps, KINDS):
        q, keys, values = make_inputs(o, step["order"], 9, step["bound"], step["dtype"])
        options = options_of(o, step["bound"], step["degree"]) | {"causal": kind == "causal"}
        out, certificate = tensor_attention(q, keys, values, **options, return_certificate=True)
        exact = tensor_attention_reference(q, keys, values, scale=1 / o.score_dim, causal=kind == "causal")
        if not ((out.double() - exact).abs() <= certificate.error).all():
            name = f"order {step['order']}, degree {step['degree']}, {kind}"
            sys.exit(f"{name}: the output is farther from the exact one than its certificate says: nothing is timed")


def tuples(order, n, kind):
    """Tuples of tokens that all queries see together; causal, the sum of i^(order - 1) by the midpoint rule."""
    return n**order if kind == "bidirectional" else (n + 0.5) ** order / order


def jobs(o, steps):
    """What is timed: the exact path of each order, and the polynomial of each step, at some lengths."""
    for order, kind in itertools.product(o.orders, KINDS):
        for n in sorted({max(4, int((o.tuples / 16**fewer) ** (1 / order) + 1e-9)) for fewer in range(4)}):
            inputs = make_inputs(o, order, n, 1.0, "float32")
            yield {"order": order, "kind": kind, "degree": None, "n": n}, inputs, {"scale": 1 / o.score_dim}
    for step, kind in itertools.product(steps, KINDS):
        longest = max(128, min(2**16, o.numbers // step["features"]) // 64 * 64)
        for n in (longest // 4, longest):
            inputs = make_inputs(o, step["order"], n, step["bound"], step["dtype"])
            options = options_of(o, step["bound"], step["degree"])
            yield {"order": step["order"], "kind": kind, "degree": step["degree"], "n": n}, inputs, options


def measure(o, steps):
    """Median processor seconds of every job, and processor over wall time of all."""

    def run(inputs, options):
        with torch.no_grad():
            tensor_attention(*inputs, **options)

    found = [(job | {"samples": []}, inputs, options | {"causal": job["kind"] == "causal"}) for job, inputs, options in jobs(o, steps)]
    wall = cpu = 0.0
    with tqdm(total=len(found) * (o.repeats + 1), mininterval=1, unit="call") as bar:
        for i in range(o.repeats + 1):
            for job, inputs, options in found:
                path = "exact" if job["degree"] is None else f"degree {job['degree']}"
                bar.set_postfix_str(f"order {job['order']}, {path}, n = {job['n']}")
                seconds, used = timed("cpu", run, inputs, options)
                if i:  # the first round warms up
                    job["samples"].append(used)
                    wall, cpu = wall + seconds, cpu + used
                bar.update(1)
    return [job | {"seconds": statistics.median(job["samples"])} for job, _, _ in found], cpu / wall


def law(points, terms):
    """Coefficients, none negative, of the sum of terms that is relatively nearest to measured (n, seconds), and its largest error."""
    used = list(range(len(terms)))
    seconds = torch.tensor([s for _, s in points], dtype=torch.float64)
    table = torch.tensor([[float(term(n)) for term in terms] for n, _ in points], dtype=torch.float64) / seconds[:, None]
    if not table.isfinite().all():
        raise ValueError("a measured time is not a positive number: a law cannot be fitted to it")
    # Terms differ by many powers of ten.
    size = table.abs().amax(0)
    while True:
        solution = torch.linalg.lstsq((table / size)[:, used], torch.ones(len(points), 1, dtype=torch.float64), driver="gelsd").solution
        if solution.min() >= 0 or len(used) == 1:
            break
        used.pop(solution[:, 0].argmin().item())
    coefficients = torch.zeros(len(terms), dtype=torch.float64)
    coefficients[used] = solution[:, 0] / size[used]
    return coefficients.tolist(), (table @ coefficients - 1).abs().max().item()


def exact_terms(order, kind):
    return [*LINE, lambda n: tuples(order, n, kind)]


def predict(coefficients, terms, n):
    return sum(c * term(n) for c, term in zip(coefficients, terms))


def pays(line, coefficients, terms, n):
    return predict(line, LINE, n) < predict(coefficients, terms, n)


def crossing(pays):
    """The least length, to a percent, from which on ``pays(n)`` holds; infinity where there is none."""
    n = FARTHEST
    if not pays(n):
        return math.inf
    while n > 1 and pays(n / 1.01):
        n /= 1.01
    return n


def laws(o, steps, times):
    """For each order and kind: the law of the exact path; and to every step its law and the length from which on it pays."""
    exact = {}
    for order, kind in itertools.product(o.orders, KINDS):
        points = [(job["n"], job["seconds"]) for job in times if (job["order"], job["kind"], job["degree"]) == (order, kind, None)]
        terms = exact_terms(order, kind)
        coefficients, error = law(points, terms)
        exact[order, kind] = {"coefficients": coefficients, "error": error, "points": points, "longest": points[-1][0]}
        for step in (step for step in steps if step["order"] == order):
            key = (order, kind, step["degree"])
            points = [(job["n"], job["seconds"]) for job in times if (job["order"], job["kind"], job["degree"]) == key]
            line, _ = law(points, LINE)

            faster = functools.partial(pays, line, coefficients, terms)
            step[kind] = {"coefficients": line, "points": points, "from": crossing(faster)}
    return exact


def score_bound(o, degree):
    """The largest score bound of a degree, which need not be whole; beyond LAST, where float64 fails the coefficients, by the slope."""
    low = min(int(degree), LAST - 1) if degree < LAST else LAST - 4
    high = low + 1 if degree < LAST else LAST
    left, right = largest_score(low, o.tolerance), largest_score(high, o.tolerance)
    return left + (degree - low) / (high - low) * (right - left)


def growth(o, steps, exact, order, kind, n):
    """The theorem's own setting, by the laws: the largest score bound that pays at n tokens with ln(n) entries, without limits.

    The time of a token is taken to grow with the features as it does from degree to degree at --score-dim; degrees in between count.
    """
    per_token = [(step["features"], step[kind]["coefficients"][1]) for step in steps if step["order"] == order]
    line, _ = law([point for point in per_token if point[1] > 0], LINE)
    allowed = predict(exact[order, kind]["coefficients"], exact_terms(order, kind), n) / n
    dim, low, high = math.log(n), 0.0, 1000.0
    while high - low > 1e-3:
        degree = (low + high) / 2
        features = math.exp(min(700, math.lgamma(dim + degree + 1) - math.lgamma(degree + 1) - math.lgamma(dim + 1)))
        low, high = (degree, high) if predict(line, LINE, features) < allowed else (low, degree)
    return score_bound(o, low)


# The report


def best_bound(steps, kind, n):
    """The largest bound at which the polynomial pays at n tokens; nan where none does."""
    return max((step["bound"] for step in steps if step[kind]["from"] <= n), default=math.nan)


def short(x, digits=3):
    """With so many digits that count, written out."""
    return f"{float(f'{x:.{digits}g}'):,.15g}"


def length(n, exact):
    """A break-even length in words: ~ where it follows from the exact path's law, beyond the rows that it was timed on."""
    shortest, longest = exact["points"][0][0], exact["points"][-1][0]
    if n == math.inf:
        return "never"
    return f"under {shortest:,}" if n < shortest else f"{'~' * (n > longest)}{short(n, 2)}"


def bounds_table(o, cells, steps, exact):
    head = ["order", "B", "scores within", "degree", "features", "dtype", "delta", "error within", "µs a token", "pays from n ="]
    rows = []
    for found in cells:
        row = [str(found["order"]), f"{found['bound']:g}", f"{found['scores']:.3g}"]
        if "reason" in found:
            row += [f"none: {found['reason']}", *[""] * 6]
        else:
            step = next(step for step in steps if (step["order"], step["degree"]) == (found["order"], found["degree"]))
            row += [str(found["degree"]), f"{found['features']:,}", found["dtype"], f"{found['delta']:.1e}", f"{found['error']:.1e}"]
            row.append(" / ".join(short(step[kind]["coefficients"][1] * 1e6) for kind in KINDS))
            row.append(" / ".join(length(step[kind]["from"], exact[found["order"], kind]) for kind in KINDS))
        rows.append(row)
    return table(head, rows, 0)


def exact_table(o, exact):
    rows = []
    for (order, kind), found in exact.items():
        points = ", ".join(f"{n:,}: {short(seconds * 1e3)} ms" for n, seconds in found["points"])
        seen = {"bidirectional": f"n^{order}", "causal": f"n^{order} / {order}"}[kind]
        parts = [f"{c * 1e6:.3g} µs{unit}" for c, unit in zip(found["coefficients"], ("", " n", f" {seen}")) if c]
        far = predict(found["coefficients"], exact_terms(order, kind), 65536)
        rows.append([str(order), kind, points, " + ".join(parts), f"{found['error']:.0%}", f"{short(far)} s"])
    return table(["order", "attention", "measured", "law", "largest error", "at 65,536 tokens, by the law"], rows, 4)


def growth_table(o, steps, exact):
    rows = []
    for n in (10**2, 10**3, 10**4, 10**5, 10**6):
        cells, known = [], largest_score(LAST, o.tolerance)
        for order in o.orders:
            if n < exact[order, "bidirectional"]["points"][0][0]:
                cells.append("")
                continue
            x = growth(o, steps, exact, order, "bidirectional", n)
            cells.append(f"{'~' * (x > known)}{x ** (1 / order):.2f}, {x:.2f}, {x / math.log(n):.2f}")
        rows.append([f"{n:,}", f"{math.log(n):.1f}", *cells])
    return table(["n", "ln n", *(f"order {order}: B, B^{order}, B^{order} / ln n" for order in o.orders)], rows, 0)


def draw(o, cells, steps, exact, path):
    """Time against n by order; break-even length, features, and the largest bound that pays, by order."""
    from matplotlib import colormaps

    columns = max(3, len(o.orders))
    title = "Tensor attention with bounded entries: the exact path, and the polynomial of each degree"
    with figure(path, columns, 2, (4.6 * columns, 8.4), title) as (_, (above, below)):
        for axes, order in zip(above, o.orders):
            draw_times(axes, o, order, cells, steps, exact, colormaps["viridis"])
        draw_bounds(*below[:3], o, steps, exact)
        for axes in (*above[: len(o.orders)], *below[:3]):
            axes.grid(alpha=0.25)
        for axes in (*above[len(o.orders) :], *below[3:]):
            axes.set_visible(False)


def draw_times(axes, o, order, cells, steps, exact, shades):
    law_of_exact, own = exact[order, "causal"], [cell for cell in cells if cell["order"] == order and "degree" in cell]
    bounds = {cell["degree"]: cell["bound"] for cell in own}
    lengths = [2 ** (i / 4) for i in range(4 * 3, 4 * 18 + 1)]
    times = [predict(law_of_exact["coefficients"], exact_terms(order, "causal"), n) for n in lengths]
    axes.plot(lengths, times, "--", color="0.2", linewidth=1)
    axes.plot(*zip(*law_of_exact["points"]), "o-", color="0.2", markersize=3, label="exact (dashed: law)")
    for i, (degree, bound) in enumerate(bounds.items()):
        color = shades(i / max(1, len(bounds)))
        step = next(step for step in steps if (step["order"], step["degree"]) == (order, degree))["causal"]
        axes.plot(lengths, [predict(step["coefficients"], LINE, n) for n in lengths], color=color, linewidth=1)
        axes.plot(*zip(*step["points"]), "o", color=color, markersize=3, label=f"B = {bound:g}, degree {degree}")
    axes.set(yscale="log", xlabel="tokens", ylabel="seconds", title=f"order {order}, causal: a forward pass", ylim=(1e-5, 1e4))
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=7)


def draw_bounds(pays, sizes, bounds, o, steps, exact):
    for i, order in enumerate(o.orders):
        own, color = [step for step in steps if step["order"] == order], f"C{i}"
        ends = [0, *(step["bound"] for step in own)]
        for kind, style in zip(KINDS, ("-", ":")):
            label = f"order {order}" if kind == "causal" else None
            starts = [min(max(step[kind]["from"], exact[order, kind]["points"][0][0]), 1e9) for step in own]
            pays.stairs(starts, ends, baseline=None, color=color, linestyle=style, label=label)
        sizes.stairs([step["features"] for step in own], ends, baseline=None, color=color, label=f"order {order}")
        for axes in (pays, sizes):
            axes.axvline(ends[-1], color=color, linewidth=0.6, linestyle="--")
        shortest = exact[order, "causal"]["points"][0][0]
        lengths = [n for n in (10 ** (j / 8) for j in range(8, 8 * 7 + 1)) if n >= shortest]
        bounds.plot(lengths, [best_bound(own, "causal", n) for n in lengths], color=color, label=f"order {order}")
        setting = [growth(o, steps, exact, order, "causal", n) ** (1 / order) for n in lengths]
        bounds.plot(lengths, setting, "--", color=color)
        bounds.plot(lengths, [setting[-1] * (math.log(n) / math.log(lengths[-1])) ** (1 / order) for n in lengths], ":", color=color)
    pays.set(yscale="log", xlabel="entry bound B", ylabel="tokens", title="the polynomial pays from\n(dotted: bidirectional)")
    sizes.set(yscale="log", xlabel="entry bound B", ylabel="features", title="features that a bound needs")
    bounds.set(xscale="log", xlabel="tokens", ylabel="entry bound B")
    lines = f"solid: {o.score_dim} entries; dashed: ln n entries; dotted: (ln n)^(1/order)"
    bounds.set_title(f"largest bound that pays, causal\n{lines}", fontsize=9)
    for axes in (pays, sizes, bounds):
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def report(o, record, cells, steps, exact, picture):
    info = record["machine"]
    last = {order: [step for step in steps if step["order"] == order][-1] for order in o.orders}
    busy = f"a load of {info['load'][0]:.1f} on {info['cores']} cores, and {record['cpu']:.0%} of a processor for the thread"
    ends = ", ".join(f"{step['bound']:.2f} at order {order}" for order, step in last.items())
    return f"""# Bounded entries against order: where near-linear tensor attention pays

Near-linear time needs bounded entries: with entries within B = o((log n)^(1/k)) attention of order k takes n^(1+o(1)) time, at
B = Omega((log n)^(1/k)) nothing beats n^(k-o(1)) under the strong exponential time hypothesis ([Alman and Song, arXiv 2310.04064](https://arxiv.org/abs/2310.04064)).
This is what that looks like in the package, at one accuracy: relative error of the weights, delta, within {o.tolerance:g}.

```bash
{record["command"]}
```

Queries and keys of {o.score_dim} entries within B, scale 1/{o.score_dim}, so that scores of order k lie within B^k; values of
{o.value_dim} entries; forward passes of one row and one head. Times are processor seconds of one thread ({info["processor"]}), medians of
{o.repeats} rounds in which all cases take turns. The machine was shared: {busy}.
Read the times as ratios within this run.

{bounds_table(o, cells, steps, exact)}

- Two figures are causal / bidirectional. "error within": the certificate for products of values within 1, rounding included. float64
  is taken where float32's part of it would exceed {o.tolerance:g}; the exact path is in float32 throughout.
- "µs a token" is measured. "pays from" is where the polynomial's line crosses the exact path's law: without ~ within the lengths on
  which the exact path was timed, with ~ beyond them. The time of a polynomial is that of its degree, at the largest bound it serves.
- With {o.score_dim} entries and at most {MAX_FEATURES:,} features the bound ends at {ends}: higher B has no near-linear path here.

The exact path, and its law:

{exact_table(o, exact)}

![time, break-even length, features and largest bound](images/{picture.name})

## How far the bound may grow with n

At a fixed number of entries a longer row pays for more features, and the bound may grow until they run out. The theorem lets the number
of entries grow with log n. With ln n entries, and the time of a token in proportion to the features as measured above, the largest bound
at which the polynomial is faster than the exact path is, bidirectional:

{growth_table(o, steps, exact)}

By the laws alone, not measured, and without the limits of {MAX_FEATURES:,} features and degree {MAX_DEGREE}; ~: of a degree above
{LAST}, for which the largest score is taken to grow with the degree as up to there, since float64 does not hold the coefficients. The
theorem says that B^k / ln n stays bounded: what may grow with log n is the score, and B only as its k-th root.
"""


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sizes = {"score-dim": 8, "value-dim": 64, "tuples": 2**28, "numbers": 2**22, "repeats": 3}
    for name, default in (sizes | {"tolerance": 1e-3}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/tensor-tradeoff"), help="folder of the times; measured once")
    parser.add_argument("--report", type=Path, help="Markdown file, its picture under images/ beside it; in the output by default")
    o = parser.parse_args(arguments)
    numbers = {name: min(x) if isinstance(x, list) else x for name, x in vars(o).items() if name not in ("output", "report", "orders")}
    faults = [f"--{name.replace('_', '-')} {x} must be positive" for name, x in numbers.items() if not x > 0]
    faults += [f"--orders {order} must be at least 2" for order in o.orders if order < 2]
    if o.output.exists() and not o.output.is_dir():
        faults.append(f"--output {o.output} is a file; name a folder")
    if faults:
        sys.exit("\n".join(faults))
    o.orders, o.bounds = sorted(set(o.orders)), sorted(set(o.bounds))
    o.report = o.report or o.output / "tensor-tradeoff.md"
    return o


def main(arguments):
    o = parse(arguments)
    torch.set_num_threads(1)
    record, path = None, o.output / "tensor-tradeoff.json"
    options = {name: x for name, x in vars(o).items() if name not in ("bounds", "output", "report")}
    if path.is_file():
        record = json.loads(path.read_text())
        if record["options"] != options:
            sys.exit(f"{path} was measured with other options: give another --output")
    steps = [step for order in o.orders for step in ladder(o, order)]
    cells = [cell(o, [step for step in steps if step["order"] == order], order, bound) for order in o.orders for bound in o.bounds]
    if record is None:
        verify(o, steps)
        times, cpu = measure(o, steps)
        record = {"command": command(), "machine": machine(), "cpu": cpu, "options": options, "times": times}
        o.output.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    exact = laws(o, steps, record["times"])
    picture = o.report.parent / "images" / f"{o.report.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib"):
        draw(o, cells, steps, exact, picture)
    write_beside(o.report, record)
    o.report.write_text(report(o, record, cells, steps, exact, picture))
    print(bounds_table(o, cells, steps, exact), f"wrote {o.report}", sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The report and the plots of scripts/studies/approximation.py."""

import shlex
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

from hf_multipole.training.report import write_figures
from scripts.studies import approximation_baselines as other

# Ways that have a block size and a rank.
MULTIPOLE = ["means", "means, O(n)", "exact weights", "far bias learned", "summaries learned", "summaries learned, O(n)"]


def pick(entries: list[dict], family: str, **wanted) -> dict:
    return next(x for x in entries if x["family"] == family and all(x.get(name) == value for name, value in wanted.items()))


def mean(entry: dict) -> float:
    return statistics.fmean(entry["layers"])


def rows_of(cells: list[list[str]], head: list[str]) -> str:
    align = "".join("---:|" if i else "---|" for i in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{align}", *(f"| {' | '.join(row)} |" for row in cells)])


def equal_cost(record: dict, family: str, sizes: list[tuple[int, int]], others: list[str]) -> str:
    """Errors, mean over layers, by block size and rank, beside those of others at the same cost."""
    entries, cells = record["errors"], []
    for block_size, rank in sizes:
        own = pick(entries, family, block_size=block_size, rank=rank)
        same = [pick(entries, name, cost=own["cost"]) for name in others]
        cells.append([str(block_size), str(rank), f"{own['cost']:.0f}", *(f"{mean(x):.3f}" for x in [own, *same])])
    return rows_of(cells, ["block size", "rank", "columns", family, *others])


def by_layer_table(o, record: dict) -> str:
    """Errors of each layer, and the least and greatest of its heads, at the sizes of --learned."""
    entries, cells = record["errors"], []

    def row(name, entry):
        figures = (f"{x:.3f} ({min(heads):.2f}-{max(heads):.2f})" for x, heads in zip(entry["layers"], entry["heads"]))
        return [name, "" if entry["cost"] is None else f"{entry['cost']:.0f}", *figures]

    for block_size, rank in o.learned:
        sizes = {"block_size": block_size, "rank": rank}
        cost = pick(entries, "means", **sizes)["cost"]
        cells += [row(f"{family}, {block_size} / {rank}", pick(entries, family, **sizes)) for family in MULTIPOLE]
        cells += [row(family, pick(entries, family, cost=cost)) for family in other.baselines(record["causal"])]
    cells += [row(x["family"], x) for x in entries if x["family"] in ("uniform", "h-transformer-1d")]
    return rows_of(cells, ["", "columns", *(f"layer {i}" for i in range(record["sizes"]["layers"]))])


def heads_table(o, record: dict) -> str:
    block_size, rank = o.shown
    entries, sizes = record["errors"], {"block_size": block_size, "rank": rank}
    cost = pick(entries, "means", **sizes)["cost"]
    shown = [pick(entries, x, **sizes) for x in ("means", "summaries learned")] + [pick(entries, "window", cost=cost)]
    cells = [
        [
            f"{layer}.{head}",
            f"{found['tokens']:.1f}",
            f"{found['far'][str(block_size)]:.3f}",
            *(f"{x['heads'][layer][head]:.3f}" for x in shown),
        ]
        for layer, heads in enumerate(record["heads"])
        for head, found in enumerate(heads)
    ]
    return rows_of(cells, ["layer.head", "tokens seen", "far weight", "means", "summaries learned", "window"])


def whole_table(record: dict) -> str:
    unit = "bits per byte" if record["causal"] else "bits per masked token"
    exact = record["whole"][0]["bits"]
    cells = []
    for x in record["whole"]:
        sizes = f", {x['block_size']} / {x['rank']}" if x["block_size"] else ""
        cost = "" if x["cost"] is None else f"{x['cost']:.0f}"
        cells.append([x["family"] + sizes, cost, f"{x['bits']:.3f}", f"{100 * (x['bits'] / exact - 1):+.1f} %"])
    return rows_of(cells, ["in all layers", "columns", unit, "against exact"])


def wins(o, record: dict) -> str:
    """In how many layers, at how many sizes, multipole attention is nearer than others of its cost."""
    entries, lines = record["errors"], []
    for family, sizes in (("means", o.sizes), ("summaries learned", o.learned)):
        own = [pick(entries, family, block_size=m, rank=p) for m, p in sizes]
        counts = []
        for name in other.baselines(record["causal"]):
            pairs = [(a, b) for x in own for a, b in zip(x["layers"], pick(entries, name, cost=x["cost"])["layers"])]
            counts.append(f"{sum(a < b for a, b in pairs)} of {len(pairs)} against {name}")
        lines.append(f"- {family}: nearer to the exact output in {', '.join(counts)}")
    return "\n".join(lines)


def section(o, record: dict) -> str:
    sizes, causal = record["sizes"], record["causal"]
    block_size, rank = o.shown
    names = list(other.baselines(causal))
    dense = (sizes["context"] + 1) / 2 if causal else sizes["context"]
    return f"""### {record["model"]}

{sizes["type"]}, {"causal" if causal else "bidirectional"}: {sizes["layers"]} layers of {sizes["heads"]} heads of {sizes["head_dim"]};
{sizes["rows"]} held-out rows of {sizes["context"]:,} tokens, {sizes["fit_rows"]} others to fit. Exact attention has {dense:,.0f} columns.

Errors, mean over the layers, at the same cost:

{equal_cost(record, "means", o.sizes, names)}

{equal_cost(record, "summaries learned", o.learned, names)}

The O(n) form:

{equal_cost(record, "means, O(n)", o.sizes, names)}

Layer by layer (in brackets the least and greatest error of a head). Baselines are at the cost of the means above them:

{by_layer_table(o, record)}

Of the pairs of a layer and a size, at the cost of each:

{wins(o, record)}

Head by head, at block size {block_size} and rank {rank}: how many tokens a query sees, exp(entropy), in the mean; the weight outside of
its near field; and errors.

{heads_table(o, record)}

The whole model, with the same attention in all layers:

{whole_table(record)}
"""


def axes_style(axes, **labels) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())


def draw(o, records: list[dict], folder: Path) -> dict[str, str]:
    """The plots, by their captions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {name: f"C{i}" for i, name in enumerate(["means", "summaries learned", "window", "low rank", "largest weights", "Nystroem"])}
    layers = max(record["sizes"]["layers"] for record in records)
    figure, grid = plt.subplots(len(records), layers, figsize=(3.1 * layers, 2.9 * len(records)), squeeze=False, layout="constrained")
    for record, line in zip(records, grid):
        for layer, axes in enumerate(line[: record["sizes"]["layers"]]):
            for family, colour in colours.items():
                found = [x for x in record["errors"] if x["family"] == family]
                points = sorted((x["cost"], x["layers"][layer]) for x in found)
                own = family in MULTIPOLE
                axes.plot(*zip(*points), "o" if own else "-", color=colour, markersize=4, label=family) if points else None
            axes_style(axes, xscale="log", yscale="log", title=f"{record['model']}, layer {layer}")
            axes.title.set_fontsize(9)
        for axes in line[record["sizes"]["layers"] :]:
            axes.axis("off")
        line[0].set_ylabel("error of the output")
    for axes in grid[-1]:
        axes.set_xlabel("columns a query")
    figure.legend(*grid[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours), frameon=False)
    figure.savefig(folder / f"{o.report.stem}.png", dpi=130)
    plt.close(figure)

    block_size, rank = o.shown
    figure, plots = plt.subplots(2, len(records), figsize=(4.4 * len(records), 6.2), squeeze=False, layout="constrained")
    for record, (upper, lower) in zip(records, plots.T):
        sizes = {"block_size": block_size, "rank": rank}
        own = pick(record["errors"], "means", **sizes)
        shown = {"means": own, "summaries learned": pick(record["errors"], "summaries learned", **sizes)}
        shown |= {name: pick(record["errors"], name, cost=own["cost"]) for name in ("window", "low rank")}
        weights = [head["far"][str(block_size)] for heads in record["heads"] for head in heads]
        for name, entry in shown.items():
            upper.scatter(weights, [x for heads in entry["heads"] for x in heads], s=14, color=colours[name], label=name)
            parts = [statistics.fmean(layer[i] for layer in entry["positions"]) for i in range(len(own["positions"][0]))]
            lower.plot(
                [(i + 0.5) * record["sizes"]["context"] / len(own["positions"][0]) for i in range(len(own["positions"][0]))],
                parts,
                color=colours[name],
            )
        axes_style(
            upper, xscale="log", yscale="log", xlabel="weight outside of the near field", ylabel="error of a head", title=record["model"]
        )
        axes_style(lower, xlabel="token in the row", ylabel="error, mean over layers")
        lower.set_ylim(0)
    figure.legend(*plots[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * min(2, len(records)), frameon=False)
    figure.savefig(folder / f"{o.report.stem}-where.png", dpi=130)
    plt.close(figure)
    captions = {"error against cost, layer by layer": f"{o.report.stem}.png"}
    return captions | {"where the error sits: by the far weight of a head, and by position": f"{o.report.stem}-where.png"}


TITLE = "How far multipole attention is from exact attention"


def report(o, records: list[dict]) -> None:
    folder = o.report.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(o, records, folder) if find_spec("matplotlib") else {}
    shown = "\n\n".join(f"![{caption}](images/{name})" for caption, name in pictures.items())
    learned = ", ".join(f"{m} / {p}" for m, p in o.learned)
    figures = f"""
```bash
python -m scripts.studies.approximation {shlex.join(sys.argv[1:])}
```

Errors are the norm of the difference over the norm of the exact output of a layer, after softmax and values, before its output
projection. Fitted (at block size / rank {learned}) is on rows of the training text, {o.fit_steps} steps of Adam, one row
each; measured is on rows that neither the model nor the fit has seen. "Exact weights" are those of the far segments, with the means of
their values: an oracle, as are "low rank" and "largest weights", which take O(n^2) time to find. Columns are multiply-adds a query,
summaries included, over the 2 * head_dim of a token; not included: the pseudo-inverse of Nystroem attention, and what the oracles need.

{shown}

{chr(10).join(section(o, record) for record in records)}"""
    write_figures(o.report, TITLE, figures)

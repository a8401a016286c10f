"""The report and the plots of scripts/studies/approximation.py."""

import statistics
from importlib.util import find_spec
from pathlib import Path

from hf_multipole.training.figures import colours, figure
from scripts.common.reports import command, table, write_beside, write_figures
from scripts.studies import approximation_baselines as other

# Ways that have a block size and a rank.
MULTIPOLE = ["means", "means, O(n)", "exact weights", "far bias learned", "summaries learned", "summaries learned, O(n)"]


def pick(entries: list[dict], family: str, **wanted) -> dict:
    return next(x for x in entries if x["family"] == family and all(x.get(name) == value for name, value in wanted.items()))


def mean(entry: dict) -> float:
    return statistics.fmean(entry["layers"])


def equal_cost(record: dict, family: str, sizes: list[tuple[int, int]], others: list[str]) -> str:
    """Errors, mean over layers, by block size and rank, beside those of others at the same cost."""
    entries, cells = record["errors"], []
    for block_size, rank in sizes:
        own = pick(entries, family, block_size=block_size, rank=rank)
        same = [pick(entries, name, cost=own["cost"]) for name in others]
        cells.append([str(block_size), str(rank), f"{own['cost']:.0f}", *(f"{mean(x):.3f}" for x in [own, *same])])
    return table(["block size", "rank", "columns", family, *others], cells)


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
    return table(["", "columns", *(f"layer {i}" for i in range(record["sizes"]["layers"]))], cells)


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
    return table(["layer.head", "tokens seen", "far weight", "means", "summaries learned", "window"], cells)


def whole_table(record: dict) -> str:
    unit = "bits per byte" if record["causal"] else "bits per masked token"
    exact = record["whole"][0]["bits"]
    cells = []
    for x in record["whole"]:
        sizes = f", {x['block_size']} / {x['rank']}" if x["block_size"] else ""
        cost = "" if x["cost"] is None else f"{x['cost']:.0f}"
        cells.append([x["family"] + sizes, cost, f"{x['bits']:.3f}", f"{100 * (x['bits'] / exact - 1):+.1f} %"])
    return table(["in all layers", "columns", unit, "against exact"], cells)


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


def draw(o, records: list[dict], folder: Path) -> dict[str, str]:
    """The plots, by their captions."""
    shades = colours(["means", "summaries learned", "window", "low rank", "largest weights", "Nystroem"])
    layers = max(record["sizes"]["layers"] for record in records)
    size = (max(8.0, 3.1 * layers), 0.8 + 2.9 * len(records))
    title = "Error of a layer's output, by what a query costs\ndots: multipole attention; lines: others"
    with figure(folder / f"{o.report.stem}.png", layers, len(records), size, title) as (picture, grid):
        for record, line in zip(records, grid):
            for layer, axes in enumerate(line[: record["sizes"]["layers"]]):
                for family, colour in shades.items():
                    points = sorted((x["cost"], x["layers"][layer]) for x in record["errors"] if x["family"] == family)
                    if points:
                        axes.plot(*zip(*points), "o" if family in MULTIPOLE else "-", color=colour, markersize=4, label=family)
                axes.set(xscale="log", yscale="log")
                axes.set_title(f"{record['model']}, layer {layer}", fontsize=9)
            for axes in line[record["sizes"]["layers"] :]:
                axes.axis("off")
            line[0].set_ylabel("error of the output")
        for axes in grid[-1]:
            axes.set_xlabel("columns a query")
        picture.legend(*grid[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shades), frameon=False)

    block_size, rank = o.shown
    sizes, title = {"block_size": block_size, "rank": rank}, f"Where the error sits, at block size {block_size} and rank {rank}"
    where, wide = folder / f"{o.report.stem}-where.png", len(records)
    with figure(where, wide, 2, (4.6 * wide, 6.8), title) as (picture, plots):
        for record, (upper, lower) in zip(records, plots.T):
            own = pick(record["errors"], "means", **sizes)
            shown = {"means": own, "summaries learned": pick(record["errors"], "summaries learned", **sizes)}
            shown |= {name: pick(record["errors"], name, cost=own["cost"]) for name in ("window", "low rank")}
            weights = [head["far"][str(block_size)] for heads in record["heads"] for head in heads]
            count = len(own["positions"][0])
            for name, entry in shown.items():
                upper.scatter(weights, [x for heads in entry["heads"] for x in heads], s=14, color=shades[name], label=name)
                parts = [statistics.fmean(layer[i] for layer in entry["positions"]) for i in range(count)]
                lower.plot([(i + 0.5) * record["sizes"]["context"] / count for i in range(count)], parts, color=shades[name])
            upper.set(
                xscale="log", yscale="log", xlabel="weight outside of the near field", ylabel="error of a head", title=record["model"]
            )
            lower.set(xlabel="token in the row", ylabel="error, mean over layers")
            lower.set_ylim(0)
        picture.legend(*plots[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * min(2, wide), frameon=False)
    return {
        "error against cost, layer by layer": f"{o.report.stem}.png",
        "where the error sits: by the far weight of a head, and by position": where.name,
    }


TITLE = "How far multipole attention is from exact attention"


def report(o, records: list[dict]) -> None:
    folder = o.report.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(o, records, folder) if find_spec("matplotlib") else {}
    shown = "\n\n".join(f"![{caption}](images/{name})" for caption, name in pictures.items())
    learned = ", ".join(f"{m} / {p}" for m, p in o.learned)
    figures = f"""
```bash
{command()}
```

Errors are the norm of the difference over the norm of the exact output of a layer, after softmax and values, before its output
projection. Fitted (at block size / rank {learned}) is on rows of the training text, {o.fit_steps} steps of Adam, one row
each; measured is on rows that neither the model nor the fit has seen. "Exact weights" are those of the far segments, with the means of
their values: an oracle, as are "low rank" and "largest weights", which take O(n^2) time to find. Columns are multiply-adds a query,
summaries included, over the 2 * head_dim of a token; not included: the pseudo-inverse of Nystroem attention, and what the oracles need.

{shown}

{chr(10).join(section(o, record) for record in records)}"""
    write_figures(o.report, TITLE, figures)
    write_beside(o.report, {"command": command(), "models": records})

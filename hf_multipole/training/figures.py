"""Pictures: one colour for a method everywhere, axes with ticks that a person reads, labels at the ends of lines that do not overlap.

matplotlib is an extra ("plot"): it is imported where something is drawn.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

# The first whose pattern is found in a method's name, in lower case; the tables, reports and command lines call methods by these names.
COLOURS = {
    r"alibi": "#b8860b",
    r"tensor.*window": "#e6ab02",
    r"tensor polynomial.*path": "#9e7cc1",
    r"polynomial": "#c44e9b",
    r"tensor": "#6a3d9a",
    r"mean": "#7fb2e5",
    r"direct\b": "#0b3c6f",
    r"\bnear|sliding|window": "#ff7f0e",
    r"local": "#8c564b",
    r"h-transformer": "#d62728",
    r"nystr": "#e377c2",
    r"multipole.linear|o\(n\)": "#17a2b8",
    r"multipole|this model|summaries|state": "#1f77b4",
    r"linear": "#2ca02c",
    r"full|exact|sdpa|dense|einsum": "#444444",
    r"low rank": "#9a9a32",
    r"largest": "#a0a0a0",
}
OTHERS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#6a3d9a", "#8c564b", "#17a2b8", "#e377c2")


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of the methods in one picture: that of the method, lighter for its second and third kind."""
    out: dict[str, str] = {}
    seen: dict[str, int] = {}
    for name in names:
        base = next((colour for pattern, colour in COLOURS.items() if re.search(pattern, name.lower())), None)
        base = base or OTHERS[len(out) % len(OTHERS)]
        count = seen[base] = seen.get(base, -1) + 1
        share = 0.62**count
        parts = (int(base[i : i + 2], 16) for i in (1, 3, 5))
        out[name] = "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)
    return out


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] = (7.0, 4.2), title: str = "", **options) -> Iterator:
    """A figure of ``size`` inches and its plots ``(rows, columns)``, to draw in; written to ``path`` at the end.

    ``options``: of matplotlib's subplots.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=size, layout="constrained")
    plots = picture.subplots(rows, columns, squeeze=False, **options)
    if title:
        picture.suptitle(title)
    yield picture, plots
    for axes in plots.flat:
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            readable(axis)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=150)


def short(x: float, thousand: int = 1000) -> str:
    """A number on a logarithmic axis: 0.05, 2, 500, 1k, 16k, 1M."""
    for unit, name in ((thousand**2, "M"), (thousand, "k")):
        if x >= unit and x % unit == 0:
            return f"{x / unit:g}{name}"
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def log_ticks(low: float, high: float, base: float) -> list[float]:
    """Three to eight round numbers of the range, as evenly spread on a logarithmic axis as they can be; fewer where it is too short."""
    if base == 2:
        powers = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        return powers[:: math.ceil(len(powers) / 8) or 1]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [step * 10.0**i for i in decades for step in steps if low <= step * 10.0**i <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return []


def readable(axis) -> None:
    """At least three ticks, in plain numbers. An axis whose ticks were set keeps them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    if axis.get_scale() == "log":
        axis.set_minor_locator(NullLocator())
    if isinstance(axis.get_major_locator(), FixedLocator | NullLocator):
        return
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log":
        base = axis.get_transform().base
        ticks = log_ticks(low, high, base)
        if len(ticks) < 3:  # too short for round powers
            ticks = [x for x in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= x <= high]
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda x, _: short(x, 1024 if base == 2 else 1000)))
    elif high >= 1000 and not axis.get_majorticklabels()[0].get_text().strip("0123456789.\u2212"):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def label_ends(axes, size: float = 9) -> None:
    """Says each labelled line's name beside its end, in its colour, in place of a legend. To be called when all is drawn."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    axes.figure.draw_without_rendering()
    height = [axes.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1] for line in lines]
    height = [axes.transAxes.inverted().transform((0, y))[1] for y in height]
    order = sorted(range(len(lines)), key=height.__getitem__)
    gap = 1.3 * size / 72 * axes.figure.dpi / axes.get_window_extent().height
    for i, place in zip(order, spread_apart([height[i] for i in order], gap)):
        line, colour = lines[i], lines[i].get_color()
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 2}
        at = {"xytext": (1.03, place), "textcoords": "axes fraction", "annotation_clip": False, "va": "center", "fontsize": size}
        axes.annotate(line.get_label(), (line.get_xdata()[-1], line.get_ydata()[-1]), **at, color=colour, arrowprops=leader)


def spread_apart(places: list[float], gap: float) -> list[float]:
    """Places in rising order, moved as little as leaves ``gap`` between neighbours: those that touch become groups about their mean."""
    groups: list[tuple[float, int]] = []  # mean of place less offset in the group, and how many
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1:
            (below, m), (above, n) = groups[-2:]
            if above - below >= gap * (m + n) / 2:
                break
            groups[-2:] = [((below * m + above * n) / (m + n), m + n)]
    return [middle + (i - (count - 1) / 2) * gap for middle, count in groups for i in range(count)]


# What a run and an evaluation leave


def plot_curves(curves: dict[str, list[dict[str, float]]], levels: dict[str, float], path: Path, unit: str = "bits per byte") -> None:
    """Held-out bits per byte, or another ``unit``, against steps, one line a run, with horizontal lines for ``levels``."""
    with figure(path) as (_, ((axes,),)):
        for name, colour in reversed(colours(curves).items()):  # the first on top
            steps, bits = ([point[what] for point in curves[name]] for what in ("step", "bits"))
            axes.plot(steps, bits, marker="o" if len(steps) == 1 else "", color=colour, label=f"{name} {bits[-1]:.2f}")
        right = max(point["step"] for points in curves.values() for point in points)
        for name, level in levels.items():
            axes.plot([0, right], [level, level], "--", color="0.5", linewidth=0.8, label=f"{name} {level:.2f}")
        axes.set(xlabel="step", ylabel=f"held-out {unit}", title=f"{unit.capitalize()} of held-out text during training")
        axes.set_ylim(top=min(axes.get_ylim()[1], max(levels.values(), default=8) + 0.7))
        label_ends(axes)


def plot_positions(results: dict[str, dict], path: Path) -> None:
    """Mean loss against the position in the row, one line a name: ``by_position`` of :func:`.evaluation.measure`."""
    with figure(path) as (_, ((axes,),)):
        for name, colour in reversed(colours(results).items()):  # the first on top
            ranges = results[name]["by_position"]
            places = [(part["from"] + part["to"] - 1) / 2 + 1 for part in ranges]
            axes.plot(places, [part["loss"] for part in ranges], color=colour, label=name)
        axes.set(xlabel="token in the row", ylabel="loss, nats a token", title="Loss on held-out text by the place in the row")
        axes.set_xscale("log", base=2)
        label_ends(axes)


def plot_reach(probes: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Recall by context length and distance, a heat map for each probe, four side by side: kind, then context length, then points such
    as those of :func:`.evaluation.probe`.
    """
    columns, rows = min(4, len(probes)), -(-len(probes) // 4)
    height = 1.6 + 0.5 * max(map(len, probes.values()))
    title = "Share of answers found, by how far back the answer stands"
    with figure(path, columns, rows, (5.4 * columns, height * rows + 0.4), title) as (picture, plots):
        for axes in plots.flat[len(probes) :]:
            axes.set_axis_off()
        for axes, (kind, contexts) in zip(plots.flat, probes.items()):
            distances = sorted({point["distance"] for points in contexts.values() for point in points})
            table = [[{p["distance"]: p["recall"] for p in points}.get(d, math.nan) for d in distances] for points in contexts.values()]
            image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            axes.set(xlabel="distance, tokens", ylabel="row, tokens", title=kind)
            axes.set_xticks(range(len(distances)), [f"{x:,}" for x in distances], rotation=90, fontsize=7)
            axes.set_yticks(range(len(contexts)), contexts)
        picture.colorbar(image, ax=plots.ravel().tolist(), label="recall")


def token_weights(weights: torch.Tensor, n: int, block_size: int, rank: int) -> torch.Tensor:
    """Of ``(..., n, columns)`` attention weights, each token's ``(..., n, n)``, a summary's spread over its segment."""
    total = weights[..., :n].clone()
    column, width = n, block_size
    while n > 2 * width and weights.shape[-1] > n:
        groups, segment = -(-n // width), width // rank
        spread = weights[..., column : column + groups * rank].repeat_interleave(segment, -1) / segment
        total += spread[..., :n]
        column, width = column + groups * rank, 2 * width
    return total


@torch.no_grad()
def plot_attention(model: PreTrainedModel, tokens: torch.Tensor, path: Path) -> None:
    """Where each query looks: the mean of all layers and heads, and the head that looks farthest back.

    tokens: ``(1, n)``; a few hundred, for each picture is n x n.
    """
    config, n = model.config, tokens.shape[1]
    attentions = model(tokens, output_attentions=True).attentions
    layers = {i: token_weights(x[0].float().cpu(), n, config.block_size, config.rank) for i, x in enumerate(attentions) if x is not None}
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    layer, head = max(
        ((i, h) for i, x in layers.items() for h in range(len(x))), key=lambda at: (layers[at[0]][at[1]] * distance).sum().item()
    )
    every = torch.stack([x.mean(0) for x in layers.values()]).mean(0)
    count = sum(len(x) for x in layers.values())
    shown = {f"mean of {count} heads of {len(layers)} layers": every, f"layer {layer}, head {head}: farthest back": layers[layer][head]}
    with figure(path, 2, 1, (9.6, 4.4), "Attention weight of each token, summaries spread over theirs") as (picture, plots):
        for axes, (title, weights) in zip(plots[0], shown.items()):
            image = axes.imshow(weights.clamp(min=1e-6).log10().numpy(), cmap="magma", vmin=-5, vmax=0, interpolation="nearest")
            axes.set(xlabel="token looked at", ylabel="query", title=title)
            axes.title.set_fontsize(10)
        picture.colorbar(image, ax=plots[0].tolist(), label="attention weight, log10", shrink=0.85)


def plot_masses(masses: dict[str, torch.Tensor], kept: torch.Tensor, path: Path) -> None:
    """What the tokens of a row weigh in summaries, by place.

    masses: of each layer, by its name, ``(heads, n)``, as :func:`hf_multipole.token_masses` has them for one row. kept: ``(n,)`` bool, the
    tokens that are to be found again.
    """
    heads = max(map(len, masses.values()))
    with figure(path, heads, len(masses), (5.5 * heads, 3 * len(masses))) as (picture, plots):
        for row, (name, layer) in zip(plots, masses.items()):
            for head, axes in enumerate(row[: len(layer)]):
                for which, colour, label in ((~kept, "#bbbbbb", "other tokens"), (kept, "#1f77b4", "what is asked for later")):
                    axes.plot(which.nonzero()[:, 0], layer[head][which], ".", color=colour, label=label)
                axes.set(yscale="log", ylabel="mass", title=f"{name}, head {head}")
        picture.legend(*plots[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        for axes in plots[-1]:
            axes.set_xlabel("place in the row, tokens")


def plot_scaling(times: list[dict[str, float]], path: Path) -> None:
    """Milliseconds of a forward pass against the context length: :func:`.report.measure_scaling`."""
    with figure(path, size=(6.4, 3.8)) as (_, ((axes,),)):
        for name, label in (("seconds", "this model"), ("seconds_exact", "exact attention")):
            points = [(point["tokens"], 1000 * point[name]) for point in times]
            axes.plot(*zip(*points), marker="o", color=colours([label])[label], label=label)
        axes.set(yscale="log", xlabel="tokens of a row", ylabel="ms", title="Forward pass of one row, the same weights")
        axes.set_xscale("log", base=2)
        label_ends(axes)

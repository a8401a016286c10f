"""The results, the statistics and the report of scripts/studies/language_modelling.py.

A run, as made there, has row, budget, context, seed, values (its configuration), folder, and done.
"""

import itertools
import json
import math
import statistics
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hf_multipole.training.figures import figure, plot_curves, plot_positions
from scripts.common.reports import table, write_beside

DRAWN = 6  # rows, from the first, in the plots that have a line for each


def results(runs: list) -> list[dict]:
    """What the runs that are done left in their figures.json."""
    names = ("parameters", "metrics", "curve", "by_position", "seconds_per_step", "cpu_seconds_per_step", "peak_memory")
    out = []
    for run in (run for run in runs if run.done):
        figures = json.loads((run.folder / "figures.json").read_text())
        place = {"row": run.row, "budget": run.budget, "steps": run.values["max_steps"], "context": run.context, "seed": run.seed}
        out.append(place | {name: figures[name] for name in names})
    return out


def t_of(freedom: int) -> float:
    """What Student's t of so many degrees of freedom stays within in 95 % of cases."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def pooled(values: dict[str, list[float]]) -> tuple[float, int] | None:
    """Standard deviation within the rows, pooled over those with two seeds or more, and its degrees of freedom.

    Rows that vary by less than a fifth of what the most varying row does are left out: they are almost the same model as the one that they
    are compared with, and say little of chance.
    """
    several = [row for row in values.values() if len(row) > 1]
    most = max(map(statistics.variance, several), default=0.0)
    several = [row for row in several if statistics.variance(row) >= most / 25]
    freedom = sum(len(row) - 1 for row in several)
    if not freedom:
        return None
    return math.sqrt(sum((len(row) - 1) * statistics.variance(row) for row in several) / freedom), freedom


def group(found: list[dict], budget: str, context: int) -> dict[str, list[dict]]:
    rows = {}
    for result in found:
        if (result["budget"], result["context"]) == (budget, context):
            rows.setdefault(result["row"], []).append(result)
    return rows


def second_half(found: list[dict]) -> float:
    """Bits a token in the second half of the context, mean over seeds."""
    ranges = mean_positions(found)["by_position"]
    tokens = [max(0, part["to"] - max(part["from"], ranges[-1]["to"] / 2)) for part in ranges]
    return float(np.average([part["loss"] for part in ranges], weights=tokens)) / math.log(2)


def last_fall(found: list[dict]) -> float | None:
    """Share of its loss that a row lost over the last quarter of its steps; None where the curve does not say."""
    steps, bits = ([point[name] for point in mean_curve(found)] for name in ("step", "bits"))
    if not steps or steps[0] > 0.75 * steps[-1]:
        return None
    return 1 - bits[-1] / float(np.interp(0.75 * steps[-1], steps, bits))


def differences(rows: dict[str, list[dict]], first: str, metric: str) -> dict[str, list[float]]:
    """Of each row from the first, at equal seeds: these share their order of the text, which matters more than most rows do."""
    of_first = {result["seed"]: result["metrics"][metric] for result in rows.get(first, ())}
    others = {row: [result for result in found if result["seed"] in of_first] for row, found in rows.items() if row != first}
    return {row: [result["metrics"][metric] - of_first[result["seed"]] for result in found] for row, found in others.items()}


def comparison(rows: dict[str, list[dict]], first: str, metric: str) -> str:
    """One budget and context: a line for each row, in Markdown, and how large a difference has to be."""
    apart, lines = differences(rows, first, metric), []
    spread = pooled(apart)

    def least(seeds: int) -> float:
        return t_of(spread[1]) * spread[0] / math.sqrt(seeds)

    for row, found in rows.items():
        values = [result["metrics"][metric] for result in found]
        mean = statistics.mean(values)
        cells = [row, f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(found) > 1 else ""), str(len(found)), ""]
        if apart.get(row):
            difference = statistics.mean(apart[row])
            cells[-1] = f"{difference:+.4f}"
            if spread and abs(difference) > least(len(apart[row])):
                cells[-1] = f"**{cells[-1]}**"
        fall = last_fall(found)
        cells.append(f"{statistics.mean(result['metrics']['perplexity'] for result in found):.3f}")
        cells += [f"{second_half(found):.3f}", "" if fall is None else f"{100 * fall:.1f}", f"{found[0]['parameters']:,}"]
        for name in ("seconds_per_step", "cpu_seconds_per_step"):
            seconds = [result[name] for result in found if result[name]]
            cells.append(f"{statistics.median(seconds):.3g}" if seconds else "")
        memory = [result["peak_memory"] for result in found if result["peak_memory"]]
        lines.append([*cells, f"{max(memory) / 1e6:,.0f}" if memory else ""])
    head = ["row", metric.replace("_", " "), "seeds", f"against {first}", "perplexity", "second half", "last fall, %", "parameters"]
    head += ["s a step", "CPU s a step", "peak memory, MB"]
    text = table(head, lines)
    if spread:
        most = max(map(len, apart.values()))
        text += f"\n\nA difference from {first} over one seed counts from {least(1):.4f} on, over {most} seeds from {least(most):.4f} on: "
        text += f"t s / sqrt(seeds), with s = {spread[0]:.4f}, the deviation of differences within a row, pooled, and t = "
        text += f"{t_of(spread[1]):.3f} (5 %, two-sided, {spread[1]} degrees of freedom)."
    return text


def mean_curve(found: list[dict]) -> list[dict]:
    """The curve of a row, mean over its seeds, at the steps that all of them have."""
    points = [{point["step"]: point["bits"] for point in result["curve"]} for result in found]
    steps = sorted(set.intersection(*map(set, points)))
    return [{"step": step, "bits": statistics.mean(one[step] for one in points)} for step in steps]


def mean_positions(found: list[dict]) -> dict:
    ranges = zip(*(result["by_position"] for result in found))
    return {"by_position": [parts[0] | {"loss": statistics.mean(part["loss"] for part in parts)} for parts in ranges]}


def plot_rows(found: list[dict], rows: list[str], metric: str, path: Path) -> None:
    """Every run as a point: rows below each other, a panel for each context, a shade for each budget; a bar at the mean."""
    from matplotlib import colormaps

    contexts, budgets = (list(dict.fromkeys(result[axis] for result in found)) for axis in ("context", "budget"))
    size, name = (3 + 3.6 * len(contexts), 1.9 + 0.26 * len(rows)), metric.replace("_", " ")
    title = f"{name.capitalize()} on held-out text: every run, and the mean of each row"
    with figure(path, len(contexts), 1, size, title, sharey=True) as (picture, (panels,)):
        for axes, context in zip(panels, sorted(contexts)):
            for i, budget in enumerate(budgets):
                colour = colormaps["viridis"](0.85 * (1 - i / max(1, len(budgets) - 1)))
                for row, several in group(found, budget, context).items():
                    values, place = [result["metrics"][metric] for result in several], rows.index(row)
                    axes.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.7)
                    axes.plot([statistics.mean(values)], [place], "|", color=colour, markersize=12)
                axes.plot([], [], "o", color=colour, label=f"{budget} training")
            axes.set(title=f"context {context:,}", xlabel=name)
            axes.grid(alpha=0.25)
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].invert_yaxis()
        picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(budgets), frameon=False)


def write_report(name: str, runs: list, rows: list[str], record: dict, path: Path) -> None:
    """The tables, and under images/ the plots."""
    found = record["runs"]
    masked = "mlm_probability" in runs[0].values
    metric, unit = ("masked_accuracy", "bits per masked token") if masked else ("bits_per_byte", "bits per byte")
    cells = list(dict.fromkeys((run.budget, run.context) for run in runs))
    cells = [cell for cell in cells if group(found, *cell)]
    images, sections = path.parent / "images", []
    images.mkdir(parents=True, exist_ok=True)
    plots = bool(find_spec("matplotlib"))
    if plots:
        plot_rows(found, [row for row in rows if any(result["row"] == row for result in found)], metric, images / f"{name}.png")
        sections.append(f"![every run, and means](images/{name}.png)")
    for budget, context in cells:
        part = {row: several for row in rows if (several := group(found, budget, context).get(row))}
        steps = next(iter(part.values()))[0]["steps"]
        sections += [f"## {budget}: {steps:,} steps, context {context:,}", comparison(part, rows[0], metric)]
    if plots:
        # The longest training, at its longest context.
        budget, context = max(cells, key=lambda cell: (next(iter(group(found, *cell).values()))[0]["steps"], cell[1]))
        shown = {row: several for row in rows if (several := group(found, budget, context).get(row))}
        shown = dict(itertools.islice(shown.items(), DRAWN))
        curves = {row: curve for row, several in shown.items() if (curve := mean_curve(several))}
        sections.append(f"## Curves: {budget}, context {context:,}")
        if curves:
            plot_curves(curves, {}, images / f"{name}-curves.png", unit)
            sections.append(f"![held-out curve](images/{name}-curves.png)")
        plot_positions({row: mean_positions(several) for row, several in shown.items()}, images / f"{name}-positions.png")
        sections.append(f"![loss by position](images/{name}-positions.png)")
    info = record["machine"]
    text = f"""# Study: {name.replace("-", " ")}

```bash
{record["command"]}
```

{len(found)} of {len(runs)} runs are done, on {info["processor"]} ({info["cores"]} cores, torch {info["torch"]}). Figures are means over
seeds ± their standard deviation, on held-out text, at the end of training. Differences are means over the seeds that both rows have; in
bold, larger than chance makes them in 95 % of comparisons, so that of twenty rows that do not differ one is in bold. "Second half": bits a
token in the second half of the context. "Last fall": how much of the held-out loss the last quarter of the steps took away; where that is
little, longer training would give little. "s a step" is the median of the steps' own time, "CPU s" of their processor time, and of these
the median over seeds; where runs share a processor, the latter compares them. Peak memory is the whole process's, or on CUDA that of the
tensors.
"""
    write_beside(path, record)
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join([text, *(section + "\n" for section in sections)]))
    part.replace(path)

"""Tries every architecture of the installed Transformers with attn_implementation="multipole" and writes the support table.

    python -m scripts.studies.support --output model_cards/reports/support.md

What was tried is kept in a JSON file beside it, and not tried again.
"""

import argparse
import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING

import hf_multipole
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.figures import figure
from scripts.common.reports import table
from scripts.studies.support_trials import try_architecture

EXPLANATION = """Each architecture was built small, with random weights in float64 (float32 where its experts have no float64), 75
tokens in blocks of 8, and run with `attn_implementation="multipole"`. *Runs* says that all of these hold: on rows of at most two blocks
the output is that of eager attention; no future token (in causal models) and no padding token, on either side, has influence on the
output at a real one (padding: unless it has with eager attention, too, where embeddings of neighbours are mixed); all attention
went through the attention function. *State*: generation on a `MultipoleCache` writes the same
tokens as on the cache of all keys. *Convert*: `convert` leaves the first output unchanged to the bit, and all weights come back from a
saved checkpoint."""


def runs(results: dict[str, dict]) -> str:
    rows = []
    for name, found in results.items():
        if found["status"] == "runs":
            layers = f"{found['multipole layers']} + {found['window layers']}"
            causal = "causal" if found["causal"] else "bidirectional"
            name += f" ({found['with']})" if "with" in found else ""
            rows.append([name, causal, layers, found.get("state", "-"), found.get("convert", "not known to it")])
    return table(["model type", "direction", "layers: multipole + window", "state", "convert"], rows, 5)


def draw(results: dict[str, dict], path: Path) -> None:
    """How many architectures there are of each status."""
    kinds = {"runs, causal": ("runs", True), "runs, bidirectional": ("runs", False), "refused with a reason": ("refused", None)}
    kinds |= {"fails in its own code": ("fails", None), "wrong": ("wrong", None), "not tried": ("not tried", None)}
    counts = {
        name: sum(found["status"] == status and causal in (None, found.get("causal")) for found in results.values())
        for name, (status, causal) in kinds.items()
    }
    counts = {name: count for name, count in counts.items() if count}
    with figure(path, size=(8, 0.9 + 0.33 * len(counts))) as (_, ((axes,),)):
        bars = axes.barh(list(counts), list(counts.values()), height=0.7)
        for bar, name in zip(bars, counts):
            bar.set_color({"runs": "#1f77b4", "refused": "#ff7f0e", "fails": "#d62728", "wrong": "#d62728"}.get(kinds[name][0], "0.75"))
        axes.bar_label(bars, padding=4)
        axes.invert_yaxis()
        axes.set(
            xlabel="architectures", title=f'Architectures of Transformers {transformers.__version__} with attn_implementation="multipole"'
        )
        axes.title.set_fontsize(10)


def reasons(results: dict[str, dict], status: str) -> str:
    groups: dict[str, list[str]] = {}
    for name, found in results.items():
        if found["status"] == status:
            groups.setdefault(found["reason"], []).append(name)
    order = sorted(groups, key=lambda reason: -len(groups[reason]))
    return "\n".join(f"- {reason.replace('|', '/')}: {', '.join(f'`{name}`' for name in groups[reason])}" for reason in order) or "None."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--only", nargs="+", metavar="MODEL_TYPE", help="try these only, again")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)

    kept = args.output.with_suffix(".json")
    results = json.loads(kept.read_text())["results"] if kept.is_file() else {}
    names = args.only or [name for name in sorted(CONFIG_MAPPING) if name != "multipole" and name not in results]
    for name in tqdm(names, unit="architecture"):
        results[name] = try_architecture(name)
        write_json(kept, {"transformers": transformers.__version__, "hf_multipole": hf_multipole.__version__, "results": results})
    results = dict(sorted(results.items()))
    count = {
        status: sum(found["status"] == status for found in results.values())
        for status in ("runs", "refused", "fails", "wrong", "not tried")
    }
    args.output.write_text(
        f"""# Architectures that run with attn_implementation="multipole"

Transformers {transformers.__version__}: {count["runs"]} of {len(results)} architectures run, {count["refused"]} are refused with a reason,
{count["fails"]} fail in their own code, {count["wrong"]} are wrong, {count["not tried"]} were not tried.

```bash
python -m scripts.studies.support --output {args.output}
```

{EXPLANATION}

{runs(results)}

## Refused

{reasons(results, "refused")}

## Fail in their own code

{reasons(results, "fails")}

## Wrong: do not use

{reasons(results, "wrong")}

## Not tried

{reasons(results, "not tried")}
"""
    )
    if find_spec("matplotlib"):
        draw(results, args.output.parent / "images" / f"{args.output.stem}.png")
    print(f"wrote {args.output}: {count}")


if __name__ == "__main__":
    main()

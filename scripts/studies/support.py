"""Tries every architecture of the installed Transformers with attn_implementation="multipole" and writes the support table.

    python -m scripts.studies.support --output model_cards/reports/support.md

What was tried is kept in a JSON file beside it, and not tried again.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING

import hf_multipole
from hf_multipole.training.checkpoints import write_json
from scripts.studies.support_trials import try_architecture

EXPLANATION = """Each architecture was built small, with random weights in float64 (float32 where its experts have no float64), 75
tokens in blocks of 8, and run with `attn_implementation="multipole"`. *Runs* says that all of these hold: on rows of at most two blocks
the output is that of eager attention; no future token (in causal models) and no padding token, on either side, has influence on the
output at a real one (padding: unless it has with eager attention, too, where embeddings of neighbours are mixed); all attention
went through the attention function. *State*: generation on a `MultipoleCache` writes the same
tokens as on the cache of all keys. *Convert*: `convert` leaves the first output unchanged to the bit, and all weights come back from a
saved checkpoint."""


def table(results: dict[str, dict]) -> str:
    rows = ["| model type | direction | layers: multipole + window | state | convert |", "|---|---|---|---|---|"]
    for name, found in results.items():
        if found["status"] == "runs":
            layers = f"{found['multipole layers']} + {found['window layers']}"
            state = found.get("state", "-")
            row = (name, "causal" if found["causal"] else "bidirectional", layers, state, found.get("convert", "not known to it"))
            rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


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

{table(results)}

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
    print(f"wrote {args.output}: {count}")


if __name__ == "__main__":
    main()

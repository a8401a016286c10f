"""How far multipole attention is from the exact attention of trained models, layer by layer, beside others of the same cost.

    python -m scripts.studies.approximation --models runs/causal runs/masked --folder stdlib --output runs/approximation \
        --report model_cards/reports/approximation.md

A model runs with exact attention on held-out rows; from the queries, keys and values of each of its layers the output (after softmax
and values) is worked out again by
    multipole attention with means, O(n log n) and O(n), for every --block-sizes and --ranks;
    for the pairs of --learned: with means and the exact weight of each segment, so that what is left is the error of the means of values;
        with a far bias that is fitted to the layer, with fitted hierarchical summaries and far bias, and the O(n)
        form of these. Fitted is on rows of the training text, by Adam, for the squared error of the layer's output;
    a window, the largest weights, the best low-rank approximation and, in bidirectional layers, Nystroem attention, each at the costs of
        all the above (scripts/studies/approximation_baselines.py says what is counted).
The relative error is the norm of the difference over the norm of the exact output. Then the whole model runs with each of them in all
layers, at the costs of --learned. What is measured is kept in --output, one file a model, and not measured again. In the report, what
stands above the heading "Figures" is left as it is.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import hf_multipole  # noqa: F401 (registers the multipole models)
from hf_multipole.integration.measurement import replaced_attention
from hf_multipole.modeling.learned import FarField
from hf_multipole.modeling.options import MultipoleOptions
from hf_multipole.training.arguments import DataArguments
from hf_multipole.training.batches import MaskingCollator, collate
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.data import hold_out, load_texts, pack, spread
from hf_multipole.training.errors import BAD_INPUT, fail
from hf_multipole.training.evaluation import measure
from scripts.common import peers
from scripts.common.measuring import machine
from scripts.studies import approximation_baselines as other
from scripts.studies.approximation_report import report

PARTS = 16  # of a row, each with an error of its own
# Learned kinds: what is learned beside the far bias, and whether queries are summarised, too.
LEARNED = {
    "far bias learned": ("mean", False),
    "summaries learned": ("hierarchical", False),
    "summaries learned, O(n)": ("hierarchical", True),
}
MEANS = {"means": False, "means, O(n)": True}
WEIGHT_RATE, BIAS_RATE = 3e-3, 0.1


class Way(NamedTuple):
    """A way to compute the attention of all layers of a model."""

    family: str
    cost: float | None  # columns a query
    attend: Callable  # (name of the layer, q, k, v, causal, scale) -> output
    block_size: int | None = None
    rank: int | None = None

    def describe(self) -> dict:
        return {name: x for name, x in self._asdict().items() if name != "attend"}


# Tokens of the layers


def load(o, path: Path):
    """Model, whether it is causal, its context, and held-out and fitting rows; raises before anything is computed."""
    config = AutoConfig.from_pretrained(path)
    causal = not any("MaskedLM" in name for name in config.architectures or ())
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(path, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    n = min(o.context, getattr(config, "max_position_embeddings", o.context))
    training, held_out = load_texts(DataArguments(train_folder=o.folder, train_file=o.file, context_length=n))
    if held_out is None:
        fitting, held_out = hold_out(pack(tokenizer, training, n), 10.0)
    else:
        fitting, held_out = pack(tokenizer, training, n), pack(tokenizer, held_out, n)
    return model, causal, tokenizer, spread(held_out, o.tokens // n, "held-out"), spread(fitting, o.fit_tokens // n, "other")


@torch.no_grad()
def tokens_of(model, rows, collator) -> dict[str, tuple]:
    """Queries, keys and values of each layer ``(rows, heads, n, dim)``, its direction and scale, by the layer's name."""
    found: dict[str, list] = {}

    def attend(name, q, k, v, causal, scale):
        found.setdefault(name, []).append((q, k, v, causal, scale))
        return other.exact(q, k, v, causal, scale)

    with replaced_attention(model, attend):
        for row in rows.with_format("numpy"):
            batch = collator([row])
            model(input_ids=batch["input_ids"].to(model.device), **({"use_cache": False} if model.can_generate() else {}))
    return {name: (*(torch.cat(x) for x in list(zip(*calls))[:3]), *calls[0][3:]) for name, calls in found.items()}


def fit(o, tokens: tuple, exact: torch.Tensor, options: MultipoleOptions, linear: bool) -> FarField:
    """Summaries and far bias of a layer that bring its output near to the exact one, from means and a bias of 0."""
    q, k, v, causal, scale = tokens
    heads, n, dim = q.shape[1:]
    far_field = FarField(options, heads, heads, dim, n, queries=linear and not causal).to(q.device)
    weights = [weight for summary in far_field.summaries for weight in summary.parameters()]
    groups = [{"params": weights, "lr": WEIGHT_RATE}, {"params": [far_field.far_bias], "lr": BIAS_RATE}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o.fit_steps)
    for step in range(o.fit_steps):
        row = slice(step % len(q), step % len(q) + 1)
        wanted = exact[row]
        out = other.multipole(q[row], k[row], v[row], causal, scale, options.block_size, options.rank, linear, far_field)
        loss = (out - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return far_field.requires_grad_(False)


def ways_of(o, n: int, causal: bool, fitting: dict[str, tuple]) -> list[Way]:
    """Multipole attention: with means, with exact weights, and as fitted to each layer."""
    ways = []
    for (block_size, rank), (family, linear) in [(size, kind) for kind in MEANS.items() for size in o.sizes]:

        def attend(name, q, k, v, causal, scale, sizes=(block_size, rank, linear)):
            return other.multipole(q, k, v, causal, scale, *sizes)

        ways.append(Way(family, other.multipole_cost(n, causal, block_size, rank, linear, False), attend, block_size, rank))
    for way in [way for way in ways if way.family == "means" and (way.block_size, way.rank) in o.learned]:

        def attend(name, q, k, v, causal, scale, sizes=(way.block_size, way.rank)):
            return other.weighed_segments(q, k, v, causal, scale, *sizes)

        ways.append(way._replace(family="exact weights", attend=attend))
    exact = {name: other.exact(*tokens) for name, tokens in fitting.items()}
    jobs = [(size, kind) for kind in LEARNED.items() for size in o.learned]
    with tqdm(total=len(jobs) * len(fitting), desc="fitting", unit="layer") as bar:
        for (block_size, rank), (family, (summary, linear)) in jobs:
            options = MultipoleOptions(block_size, rank, summary, far_bias_init=0.0)
            fitted = {}
            for name, tokens in fitting.items():
                torch.manual_seed(0)
                fitted[name] = fit(o, tokens, exact[name], options, linear)
                bar.update(1)

            def attend(name, q, k, v, causal, scale, sizes=(block_size, rank, linear), fitted=fitted):
                return other.multipole(q, k, v, causal, scale, *sizes, fitted[name])

            cost = other.multipole_cost(n, causal, block_size, rank, linear, summary != "mean")
            ways.append(Way(family, cost, attend, block_size, rank))
    return ways


# Figures


def sums(x: torch.Tensor) -> torch.Tensor:
    """Squares of ``(rows, heads, n, dim)`` summed by head and part of the row, ``(heads, PARTS)``."""
    return torch.stack([part.sum(1) for part in x.double().square().sum((0, 3)).tensor_split(PARTS, 1)], 1)


def errors(differences: list[torch.Tensor], exact: list[torch.Tensor]) -> dict:
    """Relative errors of the layers, of their heads and of the parts of the row, from the sums of each layer."""
    found = list(zip(differences, exact))

    def of(reduce):
        return [(reduce(a) / reduce(b)).sqrt().tolist() for a, b in found]

    return {"layers": of(lambda x: x.sum()), "heads": of(lambda x: x.sum(1)), "positions": of(lambda x: x.sum(0))}


def locality(q, k, causal: bool, scale: float, block_sizes: list[int]) -> list[dict]:
    """How each head attends: how many tokens it sees, exp(entropy), in the mean over queries; and its weight outside of the near
    field of each block size.
    """
    n = q.shape[2]
    token = torch.arange(n, device=q.device)
    heads = [{"tokens": 0.0, "far": dict.fromkeys(map(str, block_sizes), 0.0)} for _ in range(q.shape[1])]
    for row in range(len(q)):
        for head, found in enumerate(heads):
            weights = other.weights(q[row, head], k[row, head], causal, scale)
            found["tokens"] += torch.special.entr(weights).sum(1).exp().mean().item() / len(q)
            for size in block_sizes:
                far = ((token[:, None] // size) - (token // size)).abs() > 1
                found["far"][str(size)] += (weights * far).sum().item() / n / len(q)
    return heads


@torch.no_grad()
def by_layer(o, tokens: dict[str, tuple], ways: list[Way], causal: bool) -> dict:
    """Errors of all ways and of the baselines at their costs; and what the heads are like."""
    costs = sorted({way.cost for way in ways})
    functions = other.baselines(causal)
    found: dict[tuple, list] = {}
    exact, heads = [], []
    n = next(iter(tokens.values()))[0].shape[2]
    for name, (q, k, v, _, scale) in tqdm(tokens.items(), desc="layers", unit="layer"):
        wanted = other.exact(q, k, v, causal, scale)
        exact.append(sums(wanted))
        heads.append(locality(q, k, causal, scale, sorted({size for size, _ in o.sizes + o.learned})))
        outs = [(i, way.attend(name, q, k, v, causal, scale)) for i, way in enumerate(ways)]
        outs += [(("uniform", 0), other.uniform(q, k, v, causal, scale, [0])[0])]
        for family, function in functions.items():
            outs += [((family, cost), out) for cost, out in zip(costs, function(q, k, v, causal, scale, costs))]
        for key, out in outs:
            found.setdefault(key, []).append(sums(out - wanted))
    described = {i: way.describe() for i, way in enumerate(ways)}
    entries = [described.get(key, None) or {"family": key[0], "cost": key[1]} for key in found]
    peer = peers.PEERS["peer_h_transformer_1d"]
    if peer.installed() and n >= 4 * peers.BLOCK_SIZE and (causal or n & (n - 1) == 0):
        outs = [peer.attention(q, k, v, causal, scale) - other.exact(q, k, v, causal, scale) for q, k, v, _, scale in tokens.values()]
        found["h-transformer-1d"] = [sums(out) for out in outs]
        entries.append({"family": "h-transformer-1d", "cost": None})
    return {"heads": heads, "errors": [entry | errors(x, exact) for entry, x in zip(entries, found.values())]}


def whole(o, model, rows, collator, causal: bool, ways: list[Way]) -> list[dict]:
    """Bits of the model with each way in all of its layers: a byte of text, or, masked, a token that is predicted."""
    chosen = [way for way in ways if (way.block_size, way.rank) in o.learned]
    costs = {way.cost for way in chosen if way.family == "means"}
    for family, function in other.baselines(causal).items():
        for cost in sorted(costs):

            def attend(name, q, k, v, causal, scale, function=function, cost=cost):
                return function(q, k, v, causal, scale, [cost])[0]

            chosen.append(Way(family, cost, attend))
    chosen.insert(0, Way("exact", None, lambda name, *call: other.exact(*call)))
    accelerator, out = Accelerator(cpu=model.device.type == "cpu"), []
    for way in chosen:
        with replaced_attention(model, way.attend):
            figures = measure(model, rows, collator, accelerator, 1, causal, way.family)
        bits = figures["bits_per_byte"] if causal else figures["loss"] / math.log(2)
        out.append(way.describe() | {"bits": bits})
    return out


def study(o, path: Path) -> dict:
    model, causal, tokenizer, held_out, fitting = load(o, path)
    collator = collate if causal else MaskingCollator(tokenizer, 0.15, 0)
    tokens, others = tokens_of(model, held_out, collator), tokens_of(model, fitting, collator)
    n = len(held_out[0]["input_ids"])
    ways = ways_of(o, n, causal, others)
    del others
    q = next(iter(tokens.values()))[0]
    sizes = {
        "context": n,
        "rows": len(held_out),
        "fit_rows": len(fitting),
        "layers": len(tokens),
        "heads": q.shape[1],
        "head_dim": q.shape[3],
        "type": type(model).__name__,
    }
    record = {"model": path.name, "causal": causal, "sizes": sizes, "machine": machine()}
    return record | by_layer(o, tokens, ways, causal) | {"whole": whole(o, model, held_out, collator, causal, ways)}


# The command


def pair(text: str) -> tuple[int, int]:
    block_size, rank = (int(x) for x in text.split("/"))
    MultipoleOptions(block_size=block_size, rank=rank)
    return block_size, rank


def parse(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of checkpoints, causal or masked")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", help="folder of Python source text, or stdlib, of which some files are held out")
    source.add_argument("--file", nargs="+", help="text, JSON, CSV or Parquet files, of which the last tenth is held out")
    parser.add_argument("--context", type=int, default=4096, help="tokens in a row; no more than a model's positions")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens in all: of rows spread over the text")
    parser.add_argument("--fit-tokens", type=int, default=65536)
    parser.add_argument("--fit-steps", type=int, default=100)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--learned", type=pair, nargs="+", default=[(16, 4), (32, 4), (64, 4)], help="BLOCK_SIZE/RANK, of those above")
    parser.add_argument("--output", type=Path, required=True, help="folder of what was measured")
    parser.add_argument("--report", type=Path, help="Markdown file, its plots under images/ beside it; in the output by default")
    o = parser.parse_args(arguments)
    o.sizes = [(m, p) for m in o.block_sizes for p in o.ranks if m % p == 0]
    o.shown = o.learned[len(o.learned) // 2]
    o.report = o.report or o.output / "approximation.md"
    faults = [f"--{name.replace('_', '-')} must be positive" for name in ("tokens", "fit_tokens", "fit_steps") if getattr(o, name) < 1]
    faults += [f"--learned {m}/{p} is not among the --block-sizes and --ranks" for m, p in o.learned if (m, p) not in o.sizes]
    faults += [f"there is no checkpoint {path}" for path in o.models if not (path / "config.json").is_file()]
    faults += [f"two models are named {path.name}" for i, path in enumerate(o.models) if path.name in [x.name for x in o.models[:i]]]
    if o.output.exists() and not o.output.is_dir():
        faults.append(f"--output {o.output} is a file; name a folder")
    if faults:
        sys.exit("approximation.py: " + "; ".join(faults))
    return o


def main(arguments: list[str]) -> None:
    o = parse(arguments)
    options = {name: x for name, x in vars(o).items() if name not in ("models", "output", "report")}
    options = json.loads(json.dumps(options))
    records = []
    for path in o.models:
        kept = o.output / f"{path.name}.json"
        if kept.is_file():
            record = json.loads(kept.read_text())
            if record["options"] != options:
                sys.exit(f"approximation.py: {kept} was measured with other options: give another --output")
        else:
            try:
                record = study(o, path)
            except BAD_INPUT as error:
                fail("approximation.py", error)
            record |= {"options": options}
            o.output.mkdir(parents=True, exist_ok=True)
            write_json(kept, record)
        records.append(record)
    report(o, records)
    print(f"wrote {o.report}")


if __name__ == "__main__":
    main(sys.argv[1:])

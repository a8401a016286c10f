"""Draws what each query of multipole attention sees: tokens nearby, summaries of groups farther away.

python -m scripts.studies.drawings --output model_cards/reports/images/pattern.png
"""

import argparse
from pathlib import Path

from hf_multipole.modeling.hierarchy import far_columns, level_count, near_offsets
from hf_multipole.training.figures import figure

TITLES = {True: "causal", False: "bidirectional"}


def cells(n: int, block_size: int, rank: int, causal: bool) -> dict[int, list[tuple[int, int, int, int]]]:
    """What is seen as one, by level, 0 for single tokens: first query, queries, first key, keys."""
    blocks, levels = n // block_size, level_count(n, block_size)
    near = [(b, b + offset) for b in range(blocks) for offset in near_offsets(blocks, causal) if 0 <= b + offset < blocks]
    tokens = [
        (b * block_size + row, other * block_size + column)
        for b, other in near
        for row in range(block_size)
        for column in range(block_size)
    ]
    out = {0: [(query, 1, key, 1) for query, key in tokens if key <= query or not causal]}
    columns = far_columns(n, block_size, levels, causal)
    for block, column in (~columns.hidden).nonzero().tolist():
        level, width, first = (int(x) for x in (columns.level[column], columns.width[column], columns.first[block, column]))
        query = block * block_size // width * width
        # Blocks of one group see the same summaries.
        if query == block * block_size:
            out.setdefault(level, []).extend((query, width, first + r * width // rank, width // rank) for r in range(rank))
    return out


def draw(n: int, block_size: int, rank: int, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    levels = level_count(n, block_size)
    title = f"What a query sees of {n} tokens: blocks of {block_size}, {rank} summaries a group"
    with figure(path, 2, 1, (9.6, 5.2), title) as (_, (panels,)):
        for axes, causal in zip(panels, (True, False)):
            for level, found in sorted(cells(n, block_size, rank, causal).items()):
                patches = [Rectangle((key, query), keys, queries) for query, queries, key, keys in found]
                colour = colormaps["viridis"](level / (levels + 0.5))
                label = "tokens" if level == 0 else f"{rank} summaries of {block_size << (level - 1)} tokens"
                edge = {"edgecolor": "none"} if level == 0 else {"edgecolor": "white", "linewidth": 0.5}
                axes.add_collection(PatchCollection(patches, facecolor=colour, **edge))
                axes.plot([], [], "s", color=colour, label=label)
            axes.set(xlim=(0, n), ylim=(n, 0), aspect="equal", title=TITLES[causal], xlabel="key")
            axes.set_xticks(range(0, n + 1, n // 4))
            axes.set_yticks(range(0, n + 1, n // 4))
        panels[0].set_ylabel("query")
        panels[0].legend(frameon=False, loc="upper right", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True, help="image")
    args = parser.parse_args()
    for name in ("tokens", "block_size", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be positive")
    if args.tokens % args.block_size or args.block_size % args.rank:
        parser.error("--tokens must be a multiple of --block-size, and that one of --rank")
    draw(args.tokens, args.block_size, args.rank, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

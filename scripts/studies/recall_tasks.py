"""Rows that ask for what stood at some distance before: needles, passages to copy, and pairs for induction.

Every item stands at two places of a row. At the second one its first token, which stands nowhere else, is the prompt, and the tokens
after it are the answers. The tasks differ in what has to be found:
    needle: one token that holds a key and a value; the key is asked for, and a single look back finds the value;
    copy: a passage of symbols of its own after a marker: much to keep, at one place;
    induction: pairs of the symbols that the noise is of, and only the row shows which. As in copying, a token has to learn from the
        one before it what it is the answer to, before anything can be found.
"""

from typing import NamedTuple

import torch

PASSAGE = 16  # tokens after its marker
# Symbols, in this order; a needle for each key and each value.
NOISE, KEYS, VALUES, PASSAGES, MARKERS = 96, 16, 8, 96, 8
NEEDLES = KEYS * VALUES
VOCABULARY = NOISE + NEEDLES + KEYS + VALUES + PASSAGES + MARKERS
_TRIES = 16  # of finding two free places for an item


class Task(NamedTuple):
    kept: int  # tokens of an item at its first place
    asked: int  # and at its second one, the prompt included
    items: int  # of a long row
    most: int  # that a row can have, since prompts stand nowhere else
    nearest: int  # least distance that is asked for, in tokens


# Those that need much room are placed first.
TASKS = {
    "copy": Task(1 + PASSAGE, 1 + PASSAGE, 4, PASSAGES // PASSAGE, 32),
    "needle": Task(1, 2, 16, KEYS, 8),
    "induction": Task(2, 2, 16, NOISE // 2, 8),
}


def item_counts(n: int) -> dict[str, int]:
    """Items of each task in a row of n tokens: of each as many as in long rows, where they take no more than a third of it."""
    return {name: min(task.items, n // (3 * (task.kept + task.asked))) for name, task in TASKS.items()}


def distances(task: str, n: int) -> list[int]:
    """Powers of two, and 15/16 of the row: what recall is measured at."""
    nearest = TASKS[task].nearest
    return [nearest << step for step in range((n // 2 // nearest).bit_length())] + [n * 15 // 16]


def _symbols(count: int, n: int, items: dict[str, int], generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Noise ``(count, n)`` and what each task writes at both places of its items, ``(count, items, kept + asked)``."""

    def shuffled(size: int, chosen: int) -> torch.Tensor:
        return torch.rand(count, size, generator=generator).argsort(1)[:, :chosen]

    def among(symbols: torch.Tensor, drawn: int) -> torch.Tensor:
        return symbols.gather(1, (torch.rand(count, drawn, generator=generator) * symbols.shape[1]).long())

    prompts, others = shuffled(NOISE, NOISE).split([items["induction"], NOISE - items["induction"]], 1)
    pairs = torch.stack([prompts, among(others, items["induction"])], 2)
    key, value = shuffled(KEYS, items["needle"]), torch.randint(VALUES, (count, items["needle"]), generator=generator)
    start = NOISE + NEEDLES + KEYS + VALUES
    # No symbol of a passage stands in another one: the one before it says what follows.
    passages = start + shuffled(PASSAGES, items["copy"] * PASSAGE).unflatten(1, (items["copy"], PASSAGE))
    passages = torch.cat([start + PASSAGES + shuffled(MARKERS, items["copy"])[..., None], passages], 2)
    written = {
        "copy": passages.repeat(1, 1, 2),
        "needle": torch.stack([NOISE + key * VALUES + value, NOISE + NEEDLES + key, NOISE + NEEDLES + KEYS + value], 2),
        "induction": pairs.repeat(1, 1, 2),
    }
    return among(others, n), written


def draw(
    count: int, n: int, generator: torch.Generator, items: dict[str, int] | None = None, measured: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows ``(count, n)`` of symbols; at each answer its distance, and the number of its task, ``(count, n)``; 0 and -1 elsewhere.

    A distance is the number of tokens between both places of an item. It is drawn, evenly on a logarithmic scale, from all that a row
    allows; with ``measured``, rows take those of :func:`distances` in turn. Items that find no room are left out.
    items: of each task, :func:`item_counts` by default. ValueError for more than there are prompts for, and for rows that are too short.
    """
    items = item_counts(n) if items is None else {name: items.get(name, 0) for name in TASKS}
    for name, number in items.items():
        kept, asked_for, _, most, nearest = TASKS[name]
        if not 0 <= number <= most:
            raise ValueError(f"a row has at most {most} items of {name}, not {number}")
        farthest = max(nearest, distances(name, n)[-1] if measured else 0)
        if number and farthest + asked_for > n:
            raise ValueError(f"a row of {n} tokens is too short for {name} at a distance of {farthest}")
    ids, written = _symbols(count, n, items, generator)
    asked, task = torch.zeros_like(ids), torch.full_like(ids, -1)
    taken, row = torch.zeros(count, n, dtype=torch.bool), torch.arange(count)[:, None]
    for number, (name, contents) in enumerate(written.items()):
        kept, asked_for, *_, nearest = TASKS[name]
        for item in range(items[name]):
            if measured:
                at = torch.tensor(distances(name, n))
                distance = at[(row * items[name] + item) % len(at)].expand(-1, _TRIES)
            else:
                share = torch.rand(count, _TRIES, generator=generator, dtype=torch.float64)
                distance = (nearest * ((n - asked_for) / nearest) ** share).round().long()
            first = (torch.rand(count, _TRIES, generator=generator, dtype=torch.float64) * (n - asked_for - distance + 1)).long()
            both = torch.cat([torch.arange(kept), torch.arange(asked_for)])
            places = first[..., None] + both + distance[..., None] * (torch.arange(kept + asked_for) >= kept)
            free = ~taken[row[..., None], places].any(2)
            # The first try that found room, in the rows where one did.
            there = free.any(1)
            places, distance = (x[row[:, 0], free.long().argmax(1)][there] for x in (places, distance))
            where = row[there]
            taken[where, places] = True
            ids[where, places] = contents[there, item]
            asked[where, places[:, kept + 1 :]] = distance[:, None]
            task[where, places[:, kept + 1 :]] = number
    return ids, asked, task

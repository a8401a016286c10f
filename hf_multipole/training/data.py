"""Text in, blocks of tokens out."""

import hashlib
import itertools
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable
from tqdm.auto import tqdm
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from .arguments import DataArguments
from .token_bytes import TokenBytes

# A file is held out when its name hashes below this share, so that the split depends on nothing but the names.
_HELD_OUT_SHARE = 0.05
_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    "": "text",
}
# Texts that are tokenized at once, and tokens of the blocks that are kept as Python objects at once.
_TEXTS, _TOKENS = 256, 1 << 22


# Texts


def standard_library(root: str | Path | None = None) -> tuple[list[str], list[str]]:
    """Source text of Python's standard library, without its tests: training files and held-out files, in a fixed random order.

    root: the folder to read; by default that of the running interpreter.
    Raises FileNotFoundError where there is no source text.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    splits: tuple[list[str], list[str]] = ([], [])
    names = [path.relative_to(root) for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    digest = {name: hashlib.sha256(name.as_posix().encode()).digest() for name in names}
    for name in sorted(names, key=digest.get):
        text = (root / name).read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            splits[digest[name][0] < 256 * _HELD_OUT_SHARE].append(text)
    if not splits[0] or not splits[1]:
        raise FileNotFoundError(f"{root} holds no Python source files; install Python with its standard library, or name another folder")
    return splits


class Texts:
    """The texts of a dataset's column, read anew each time that they are gone through."""

    def __init__(self, dataset: Dataset | IterableDataset, column: str):
        self.dataset, self.column = dataset.select_columns([column]), column

    def __iter__(self) -> Iterator[str]:
        return (row[self.column] for row in self.dataset)


def load_texts(args: DataArguments) -> tuple[Texts | list[str], Texts | list[str] | None]:
    """Training texts, and held-out texts or None where the source has none.

    Raises ValueError and OSError, with what there is instead, for a missing dataset, file, split or column and for empty data.
    """
    if args.train_folder:
        return standard_library(None if args.train_folder == "stdlib" else args.train_folder)
    source = args.dataset_name or ", ".join(args.train_file)
    try:
        splits = _load_splits(args)
    except (DatasetsError, StopIteration, pyarrow.ArrowInvalid) as error:
        # What the loader tripped over is the cause of its own error.
        raise ValueError(f"{source} could not be read: {str(error.__cause__ or error) or 'it is empty'}") from None
    texts = [None if split is None else Texts(*_check(split, source, args.text_column)) for split in splits]
    return texts[0], texts[1]


def _load_splits(args: DataArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    if args.dataset_name:
        options: dict[str, Any] = {"path": args.dataset_name, "name": args.dataset_config_name, "revision": args.dataset_revision}
    else:
        files = {"train": args.train_file} | ({"validation": args.validation_file} if args.validation_file else {})
        kinds = set()
        for file in itertools.chain(*files.values()):
            if "://" not in file and not Path(file).is_file():
                raise FileNotFoundError(f"there is no file {file}")
            suffix = Path(file.removesuffix(".gz")).suffix
            if suffix not in _KINDS:
                raise ValueError(f"{file} is of an unknown kind {suffix!r}; known are {', '.join(filter(None, _KINDS))}, also with .gz")
            kinds.add(_KINDS[suffix])
        if len(kinds) > 1:
            raise ValueError(f"the files are of several kinds: {', '.join(sorted(kinds))}; give files of one kind")
        options = {"path": kinds.pop(), "data_files": files}
        if options["path"] == "text":
            options["sample_by"] = args.sample_by
    options["streaming"] = args.streaming
    if args.validation_split_name:
        return tuple(load_dataset(**options, split=[args.train_split_name, args.validation_split_name]))
    if "[" in args.train_split_name:
        return load_dataset(**options, split=args.train_split_name), None
    splits: DatasetDict | IterableDatasetDict = load_dataset(**options)
    if args.train_split_name not in splits:
        raise ValueError(
            f"{args.dataset_name or ', '.join(args.train_file)} has no split {args.train_split_name!r}; it has {', '.join(splits)}"
        )
    return splits[args.train_split_name], splits.get("validation")


def _check(split, source: str, column: str):
    """The split and its column, once its first row has been seen to hold text."""
    first = next(iter(split), None)
    if first is None:
        raise ValueError(f"{source} is empty")
    if column not in first:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(first)}: give text_column")
    if not isinstance(first[column], str):
        raise ValueError(f"column {column!r} of {source} holds {type(first[column]).__name__}, not text")
    return split, column


def first_files(texts: Iterable[str], size: int) -> list[str]:
    """As many of the first texts as hold ``size`` bytes, or all."""
    out, total = [], 0
    for text in texts:
        if total >= size:
            break
        out.append(text)
        total += len(text.encode("utf-8"))
    return out


# Blocks


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], end_of_text: bool = True) -> Iterator[tuple[np.ndarray, ...]]:
    """Some texts at a time, one after another: token ids, position of each token in its text, and the bytes of its text that it
    stands for (:class:`.token_bytes.TokenBytes`), all ``(tokens,)`` int32.

    end_of_text: with the tokenizer's end-of-text token after each text, where it has one; it stands for no bytes.
    """
    end = np.array([tokenizer.eos_token_id] if end_of_text and tokenizer.eos_token_id is not None else [], np.int32)
    texts, count = (text for text in texts if text), TokenBytes(tokenizer)
    while batch := list(itertools.islice(texts, _TEXTS)):
        if isinstance(tokenizer, ByT5Tokenizer):
            # The same ids as the tokenizer's own, which takes a microsecond a byte.
            ids = [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + tokenizer.offset for text in batch]
            sizes = [np.ones(len(text), np.int32) for text in ids]
        else:
            ids = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            sizes = count(batch, ids)
        ids = [np.concatenate([np.asarray(text, np.int32), end]) for text in ids]
        sizes = [np.concatenate([text, np.zeros_like(end)]) for text in sizes]
        lengths = np.array([len(text) for text in ids])
        starts = (lengths.cumsum() - lengths).astype(np.int32)
        positions = np.arange(lengths.sum(), dtype=np.int32) - np.repeat(starts, lengths)
        yield np.concatenate(ids), positions, np.concatenate(sizes)


def blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], block_length: int, boundaries: bool = False, end_of_text: bool = True
) -> Iterator[dict]:
    """Texts one after another, cut into blocks of ``block_length`` tokens; what is left at the end is dropped.

    Each has ``input_ids``, ``token_bytes``, the bytes of text that each token stands for, ``bytes``, their sum, and with
    ``boundaries`` also ``position_ids``, the position of each token in its text.
    """
    rest = (np.zeros(0, np.int32),) * 3
    for batch in encode(tokenizer, texts, end_of_text):
        ids, positions, sizes = (np.concatenate(pair) for pair in zip(rest, batch))
        whole = len(ids) // block_length * block_length
        for start in range(0, whole, block_length):
            part = slice(start, start + block_length)
            place = {"position_ids": positions[part]} if boundaries else {}
            yield {"input_ids": ids[part], "token_bytes": sizes[part], "bytes": sizes[part].sum(dtype=np.int64)} | place
        rest = ids[whole:], positions[whole:], sizes[whole:]


def _dataset(columns: dict[str, np.ndarray]) -> Dataset:
    """Columns ``(rows,)`` or ``(rows, tokens)`` as a dataset in memory, without a copy through Python's objects."""
    kinds = {name: Value("int64") if column.ndim == 1 else List(Value("int32"), column.shape[1]) for name, column in columns.items()}
    arrays = {}
    for name, column in columns.items():
        flat = pyarrow.array(column.reshape(-1), kinds[name].pa_type if column.ndim == 1 else pyarrow.int32())
        arrays[name] = flat if column.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, column.shape[1])
    return Dataset(InMemoryTable(pyarrow.table(arrays)), DatasetInfo(features=Features(kinds)))


def pack(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    block_length: int,
    max_blocks: int | None = None,
    boundaries: bool = False,
    end_of_text: bool = True,
) -> Dataset:
    """The blocks of :func:`blocks`, at most ``max_blocks`` of them, as a dataset in memory.

    Raises ValueError where the texts do not fill one block.
    """
    source = itertools.islice(blocks(tokenizer, texts, block_length, boundaries, end_of_text), max_blocks)
    parts = []
    with tqdm(desc="packing", unit=" blocks", total=max_blocks) as bar:
        while chunk := list(itertools.islice(source, max(1, _TOKENS // block_length))):
            parts.append(_dataset({name: np.stack([block[name] for block in chunk]) for name in chunk[0]}))
            bar.update(len(chunk))
    if not parts:
        total = sum(len(ids) for ids, _, _ in encode(tokenizer, texts, end_of_text))
        raise ValueError(f"the text has {total} tokens, fewer than one block of {block_length}; give more text or a smaller context_length")
    return concatenate_datasets(parts)


def recut(rows: Dataset, block_length: int) -> Dataset:
    """Blocks of another length from the tokens of a packed dataset; what is left at the end is dropped."""
    columns = {name: np.concatenate([row[name] for row in rows.with_format("numpy")]) for name in rows.column_names if name != "bytes"}
    length, count = len(rows[0]["input_ids"]), len(columns["input_ids"]) // block_length
    if count == 0:
        raise ValueError(f"the held-out rows have {len(rows) * length} tokens, fewer than a context of {block_length}: raise eval_rows")
    columns = {name: column[: count * block_length].reshape(count, block_length) for name, column in columns.items()}
    columns["bytes"] = columns["token_bytes"].sum(1, dtype=np.int64)
    return _dataset(columns)


def spread(rows: Dataset, count: int, name: str) -> Dataset:
    """So many rows, evenly spread over all: neighbours are of one file. name: of the rows, for the ValueError where there are too few."""
    if not 0 < count <= len(rows):
        raise ValueError(f"the text has {len(rows)} {name} rows of {len(rows[0]['input_ids'])} tokens, but {count} were asked for")
    return rows.select([i * len(rows) // count for i in range(count)])


def hold_out(rows: Dataset, percentage: float) -> tuple[Dataset, Dataset]:
    """All but the last blocks, and the last ones: that share of them, but at least one."""
    held = max(1, round(len(rows) * percentage / 100))
    if held >= len(rows):
        raise ValueError("the text fills too few blocks to hold one out; give more text, a validation file or a smaller context_length")
    return rows.select(range(len(rows) - held)), rows.select(range(len(rows) - held, len(rows)))


def stream(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | Texts, block_length: int, boundaries: bool, end_of_text: bool
) -> IterableDataset:
    """The blocks of :func:`blocks`, made while they are read, again and again: Trainer's place in a stream, and its accumulation of
    gradients, are right within one pass only. Raises ValueError where there is not one.
    """
    if next(blocks(tokenizer, texts, block_length, boundaries, end_of_text), None) is None:
        raise ValueError(f"the text does not fill one block of {block_length} tokens; give more text or a smaller context_length")
    if isinstance(texts, list):
        # A list would be taken for shards, each packed by itself.
        texts = tuple(texts)
    arguments = {"tokenizer": tokenizer, "texts": texts, "block_length": block_length, "boundaries": boundaries, "end_of_text": end_of_text}
    return IterableDataset.from_generator(blocks, gen_kwargs=arguments).repeat(None)

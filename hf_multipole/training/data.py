"""Text in, blocks of tokens out."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

# A file is held out when its name hashes below this share, so that the split depends on nothing but the names.
_HELD_OUT_SHARE = 0.05


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


def first_files(texts: Sequence[str], size: int) -> list[str]:
    """As many of the first texts as hold ``size`` bytes, or all."""
    out, total = [], 0
    for text in texts:
        if total >= size:
            break
        out.append(text)
        total += len(text.encode("utf-8"))
    return out


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Token ids of each text with the end-of-text token, ``(tokens,)`` int32."""
    for text in texts:
        if isinstance(tokenizer, ByT5Tokenizer):
            # The same ids as the tokenizer's own, which takes a microsecond a byte.
            ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + tokenizer.offset
        else:
            ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        yield np.concatenate([ids, np.asarray(end, np.int32)])


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block_length: int, max_blocks: int | None = None) -> Dataset:
    """Texts one after another, cut into blocks of ``block_length`` tokens (the rest is dropped), at most ``max_blocks`` of them.

    Raises ValueError where the texts do not fill one block.
    """
    needed = None if max_blocks is None else max_blocks * block_length
    parts, total = [], 0
    for ids in encode(tokenizer, texts):
        parts.append(ids)
        total += len(ids)
        if needed is not None and total >= needed:
            break
    blocks = total // block_length if max_blocks is None else min(max_blocks, total // block_length)
    if blocks == 0:
        raise ValueError(f"the text has {total} tokens, fewer than one block of {block_length}; give more text or a smaller block_length")
    rows = np.concatenate(parts)[: blocks * block_length].reshape(blocks, block_length)
    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int32"), length=block_length)}))

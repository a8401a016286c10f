"""Figures of a byte-level language model, and what general compressors reach on the same files."""

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Sequence


def bits_per_token(loss: float) -> float:
    """Mean cross-entropy in bits, from nats; with a byte-level tokenizer these are bits per byte."""
    return loss / math.log(2)


def compression_baselines(texts: Sequence[str]) -> dict[str, float]:
    """Bits per byte of the texts: entropy of single bytes, and gzip -9 and xz -9 on each text by itself."""
    files = [text.encode("utf-8") for text in texts]
    size = sum(map(len, files))
    counts = Counter(b"".join(files)).values()
    return {
        "entropy of single bytes": -sum(count / size * math.log2(count / size) for count in counts),
        "gzip -9": 8 * sum(len(gzip.compress(file, 9)) for file in files) / size,
        "xz -9": 8 * sum(len(lzma.compress(file, preset=9)) for file in files) / size,
    }

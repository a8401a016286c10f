"""How many bytes of its text each token stands for, whatever the tokenizer."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

# The bytes that byte-level vocabularies (GPT-2's and their like) write as themselves; the others follow from character 256 on.
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ALPHABET = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))
}
# How far ahead of the last token that was found the next one is looked for, in characters.
_AHEAD = 256


def _readings(token: str, added: bool) -> tuple[bytes | None, ...]:
    """What an entry of a vocabulary may stand for: SentencePiece's way, as part of a word, byte-level, and one character a byte."""
    if added:
        return (token.encode("utf-8"),) * 4
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return (bytes([int(token[3:5], 16)]),) * 4
    plain = token.replace("\u2581", " ").encode("utf-8", "surrogatepass")
    part = token.removeprefix("##").removesuffix("</w>").encode("utf-8", "surrogatepass")
    coded = bytes(_ALPHABET[letter] for letter in token) if _ALPHABET.keys() >= set(token) else None
    return plain, part, coded, token.encode("latin-1") if all(letter <= "\xff" for letter in token) else None


class TokenBytes:
    """Counts the bytes of the tokens of texts: of all tokens of a text together, those of the text in UTF-8.

    Where the entries of the vocabulary, one after another, spell the text, each has its own bytes: byte-level ones, byte fallback and
    SentencePiece's are of this kind, and parts of a character count as the bytes that they are. Otherwise (normalisation, white space
    that is left out, unknown tokens) tokens have the places that a fast tokenizer says, or those where they are found in the text;
    tokens that share a place share its bytes by their lengths. What lies between two places belongs to the token before, but for the
    white space that the token after begins with. Of a text without tokens no bytes are counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.table: dict[int, tuple[bytes | None, ...]] = {}
        self.reading = 0

    def __call__(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """``(tokens,)`` int32 for each text; ids: its tokens, without any that were put before or after."""
        self._learn({token for text in ids for token in text})
        out = [self._spelled(text.encode("utf-8"), tokens) for text, tokens in zip(texts, ids)]
        left = [i for i, sizes in enumerate(out) if sizes is None]
        if left and getattr(self.tokenizer, "is_fast", False):
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            places = self.tokenizer([texts[i] for i in left], return_offsets_mapping=True, **options)["offset_mapping"]
        else:
            places = [self._search(texts[i], ids[i]) for i in left]
        for i, place in zip(left, places):
            out[i] = self._divided(texts[i], ids[i], np.array(place, np.int64).reshape(-1, 2))
        return out

    def _learn(self, ids: set[int]) -> None:
        new = [int(token) for token in ids if token not in self.table]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        for token, name in zip(new, self.tokenizer.convert_ids_to_tokens(new)):
            self.table[token] = _readings("" if name is None else str(name), token in added)

    def _spelled(self, data: bytes, ids: Sequence[int]) -> np.ndarray | None:
        """The sizes of the entries where they spell the text, perhaps after a space that the tokenizer put before it; or else None."""
        for reading in sorted(range(4), key=lambda x: x != self.reading):
            pieces = [self.table[token][reading] for token in ids]
            if None in pieces or len(pieces) == 0:
                continue
            whole = b"".join(pieces)
            if whole == data or whole == b" " + data:
                self.reading = reading
                sizes = np.array([len(piece) for piece in pieces], np.int32)
                # The space, which is no part of the text.
                first = int((sizes > 0).argmax())
                sizes[first] -= len(whole) - len(data)
                return sizes
        return None

    def _entries(self, data: bytes, ids: Sequence[int]) -> list[bytes]:
        """The entries in the reading whose length is the closest to that of the text."""
        readings = [[self.table[token][reading] for token in ids] for reading in range(4)]
        known = [pieces for pieces in readings if None not in pieces]
        return min(known, key=lambda pieces: abs(sum(map(len, pieces)) - len(data)))

    def _search(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where the tokens stand in the text, one after another, without regard to case and accents; an empty place where one is
        not found.
        """
        letters = [_fold(letter) for letter in text]
        origin = [i for i, letter in enumerate(letters) for _ in letter]
        folded, here, places = "".join(letters), 0, []
        for token, entry in zip(ids, self._entries(text.encode("utf-8"), ids)):
            wanted = "" if token == self.tokenizer.unk_token_id else _fold(entry.decode("utf-8", "ignore").strip())
            start = folded.find(wanted, here, here + _AHEAD + len(wanted)) if wanted else -1
            if start < 0:
                places.append((0, 0))
                continue
            here = start + len(wanted)
            places.append((origin[start], origin[here - 1] + 1))
        return places

    def _divided(self, text: str, ids: Sequence[int], places: np.ndarray) -> np.ndarray:
        """The bytes of tokens with places ``(tokens, 2)`` in the text, first and last + 1 character; empty where there is none."""
        if not len(ids):
            return np.zeros(0, np.int32)
        entries = self._entries(text.encode("utf-8"), ids)
        starts, ends = places.T
        real = ends > starts
        before = np.maximum.accumulate(np.where(real, ends, 0))
        after = np.minimum.accumulate(np.where(real, starts, len(text))[::-1])[::-1]
        # Between two tokens the text is cut where all places before end before all places after begin, if either has a place.
        cuts = {}
        for i in np.flatnonzero((before[:-1] <= after[1:]) & (real[:-1] | real[1:])):
            start = starts[i + 1] if real[i + 1] else after[i + 1]
            cuts[i] = _begin(text, before[i], start, entries[i + 1], real[i + 1])
        last = np.array([*cuts, len(ids) - 1])
        letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        edges = np.concatenate([[0], (1 + (letters >= 0x80) + (letters >= 0x800) + (letters >= 0x10000)).cumsum()])
        cut = edges[np.array([*cuts.values(), len(text)], np.int64)]
        # Tokens between two cuts share what lies there.
        weights = np.maximum([len(entry) for entry in entries], 1).cumsum()
        group = np.searchsorted(last, np.arange(len(ids)))
        low, base = np.concatenate([[0], cut[:-1]])[group], np.concatenate([[0], weights[last[:-1]]])[group]
        share = (weights - base) / (weights[last][group] - base)
        bounds = low + np.rint(share * (cut[group] - low)).astype(np.int64)
        return np.diff(bounds, prepend=0).astype(np.int32)


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKD", text).casefold()
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def _begin(text: str, low: int, high: int, entry: bytes, placed: bool) -> int:
    """Where a token begins, from ``low`` on: at its place ``high``, or earlier, where the place leaves out white space that the entry
    begins with; without a place, after the white space that does not belong to it.
    """
    spaces = len(entry) - len(entry.lstrip())
    if not placed:
        while not spaces and low < high and text[low].isspace():
            low += 1
        return int(low)
    if not text[high].isspace():
        while spaces and low < high and text[high - 1].isspace():
            high, spaces = high - 1, spaces - 1
    return int(high)

"""Bytes of tokens: of every cut of a text into rows, the scored tokens together stand for the text, whatever the tokenizer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PerceiverTokenizer, PreTrainedTokenizerFast, PythonBackend

from hf_multipole.training.batches import collate
from hf_multipole.training.data import blocks, encode, hold_out, pack, recut
from hf_multipole.training.evaluation import measure, windows
from hf_multipole.training.token_bytes import TokenBytes

CORPUS = [
    "the cat sat on the mat, über den Fluß  and on \t the café ﬁnally",
    "def f(x):\n    return x  # 日本語 and 𓀀\n",
    "the the cat cat",
] * 3


def fast(model, trainer, normalizer=None, split=None, decoder=None, process=None, added=(), **options):
    tokenizer = Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", split), ("decoder", decoder), ("post_processor", process)):
        if part is not None:
            setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level(prefix=False, normalizer=None, trim=True):
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=level.alphabet(), special_tokens=["<end>"], show_progress=False)
    process = processors.ByteLevel(trim_offsets=trim)
    options = {"eos_token": "<end>", "added": [AddedToken("<tool>", lstrip=True)]}
    return fast(models.BPE(), trainer, normalizer, level, decoders.ByteLevel(), process, **options)


def word_pieces():
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    lower = normalizers.BertNormalizer(lowercase=True)
    return fast(models.WordPiece(unk_token="[UNK]"), trainer, lower, pre_tokenizers.BertPreTokenizer(), eos_token="[SEP]")


def sentence_pieces():
    pieces = ["<unk>", "</s>", "▁", "▁the", "▁c", "at", "t", "h", "e", "a", "x", "ü", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


class SlowWords(PythonBackend):
    """Lower-case words of a small vocabulary, in Python; all else is unknown."""

    def __init__(self, **options):
        self.words = ["<unk>", "<end>", "the", "cat", "cafe", "##s", "##sat", "fi", "##nally"]
        super().__init__(unk_token="<unk>", eos_token="<end>", **options)

    vocab_size = 9

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def _tokenize(self, text, **options):
        out = []
        for word in text.lower().replace("é", "e").replace("ﬁ", "fi").split():
            first = next((known for known in ("the", "cafe", "cat", "fi") if word.startswith(known)), None)
            rest = "" if first is None else f"##{word.removeprefix(first)}"
            out += ["<unk>"] if rest not in ("##", "##s", "##sat", "##nally") else [first, *([rest] if rest != "##" else [])]
        return out

    def _convert_token_to_id(self, token):
        return self.words.index(token)

    def _convert_id_to_token(self, index):
        return self.words[index]


TOKENIZERS = {
    "bytes": ByT5Tokenizer(),
    "perceiver": PerceiverTokenizer(),
    "byte level": byte_level(),
    "byte level, prefix": byte_level(prefix=True),
    "byte level, NFC": byte_level(normalizer=normalizers.NFC()),
    "word pieces": word_pieces(),
    "sentence pieces": sentence_pieces(),
    "slow words": SlowWords(),
}
TEXT = st.text(st.sampled_from("the caü日𓀀é \n\t\u0301ﬁT.x"), min_size=1, max_size=60) | st.text(min_size=1, max_size=30)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, data=st.data())
def test_any_cut_has_the_bytes_of_the_text(name, text, data):
    tokenizer = TOKENIZERS[name]
    texts = [text, "the cat. Thé ﬁnally", text + "<tool> the"]
    ids, _, sizes = (np.concatenate(x) for x in zip(*encode(tokenizer, texts)))
    assert (sizes >= 0).all() and (sizes[ids == tokenizer.eos_token_id] == 0).all()
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(ids) == sum(len(text) + 1 for text in plain)
    wanted = sum(len(text.encode()) for text, tokens in zip(texts, plain) if len(tokens))
    assert sizes.sum() == wanted
    length = data.draw(st.integers(1, len(ids)))
    rows = list(blocks(tokenizer, texts, length))
    rest = sizes[len(rows) * length :].sum()
    assert sum(int(row["bytes"]) for row in rows) + rest == wanted == sum(int(row["token_bytes"].sum()) for row in rows) + rest


def sizes_of(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (sizes,) = TokenBytes(tokenizer)([text], [ids])
    return list(zip(tokenizer.convert_ids_to_tokens(ids), sizes.tolist()))


def test_parts_of_a_character_count_as_the_bytes_that_they_are():
    """A vocabulary of the first two bytes of a character and of its last one: with places alone it would be halves."""
    found = sizes_of(TOKENIZERS["byte level"], "日 𓀀")
    assert sum(size for _, size in found) == 8 and all(size == len(token) for token, size in found)
    assert sizes_of(TOKENIZERS["sentence pieces"], "xé")[-2:] == [("<0xC3>", 1), ("<0xA9>", 1)]


@pytest.mark.parametrize("trim", [False, True])
def test_normalised_texts_keep_their_bytes_where_they_are(trim):
    """NFC shortens one letter; white space is cut from the places of the others, and still belongs to its own token."""
    tokenizer = byte_level(normalizer=normalizers.NFC(), trim=trim)
    plain, changed = sizes_of(tokenizer, "the  cat \n\n x é."), sizes_of(tokenizer, "the  cat \n\n x e\u0301.")
    assert [token for token, _ in plain] == [token for token, _ in changed]
    more = [b - a for (_, a), (_, b) in zip(plain, changed)]
    # The letter takes three bytes where its composed form takes two.
    where = [i for i, (token, _) in enumerate(plain) if "Ã" in token or "©" in token]
    assert sum(more) == 1 and all(more[i] == 0 for i in range(len(more)) if i not in where)


def test_words_and_what_is_between_them():
    assert sizes_of(TOKENIZERS["word pieces"], "the  Zürich the ")[0] == ("the", 5)
    assert sizes_of(TOKENIZERS["slow words"], "the Zürich  CAFÉS\n") == [("the", 4), ("<unk>", 9), ("cafe", 5), ("##s", 2)]
    assert sizes_of(TOKENIZERS["slow words"], "ﬁnally") == [("fi", 3), ("##nally", 5)]


def test_special_tokens_that_stand_in_the_text_count_and_others_do_not():
    assert sizes_of(TOKENIZERS["byte level"], "x <tool>x") == [("x", 2), ("<tool>", 6), ("x", 1)]
    ((ids, _, sizes),) = encode(TOKENIZERS["byte level"], ["<end>"])
    assert ids.tolist() == [TOKENIZERS["byte level"].eos_token_id] * 2 and sizes.tolist() == [5, 0]


def words_tokenizer(merged):
    split = pre_tokenizers.Split(" ", "merged_with_previous") if merged else pre_tokenizers.WhitespaceSplit()
    end = " " if merged else ""
    trainer = trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(["a" + end, "b" * 50 + end], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


class Uniform(torch.nn.Module):
    """Every token is as likely as any other of four."""

    def forward(self, input_ids, **options):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))


@pytest.mark.parametrize("merged", [False, True], ids=["white space dropped", "white space kept"])
def test_short_and_long_words(merged):
    """64 words of one byte, then 64 of fifty: each half has its own bytes, and so does what is held out of them."""
    tokenizer, text = words_tokenizer(merged), "a " * 64 + ("b" * 50 + " ") * 64
    rows = pack(tokenizer, [text], 64)
    assert rows["bytes"] == [128, 3264]
    assert recut(rows, 32)["bytes"] == [64, 64, 1632, 1632]
    tail = hold_out(rows, 10)[1]
    accelerator = Accelerator(cpu=True)
    figures = measure(Uniform(), tail, collate, accelerator, 2, True, "tail")
    # 63 words of 51 bytes are predicted, with two bits each.
    assert figures["bits_per_byte"] == pytest.approx(2 / 51)
    sliding = measure(Uniform(), windows(rows, 64, 16), collate, accelerator, 2, True, "windows")
    assert sliding["bits_per_byte"] == pytest.approx(2 * 127 / (63 * 2 + 64 * 51)) and sliding["tokens"] == 127
    both = measure(Uniform(), rows, collate, accelerator, 2, True, "both")
    assert both["bits_per_byte"] == pytest.approx(2 * 126 / (63 * 53))

import pytest
from transformers import ByT5Tokenizer

from tests.helpers.tiny_models import build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A causal multipole model of bytes with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(vocab_size=384).float().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder

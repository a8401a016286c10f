import os

import hypothesis
import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors gain nothing from threads, and xdist or a shared machine loses by them.
torch.set_num_threads(1)

# The same examples on every run, so that a failure is the change's own; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.register_profile("search", deadline=None, database=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A causal multipole model of bytes with its tokenizer."""
    # Here, for the variable above has to be set before them.
    from transformers import ByT5Tokenizer

    from tests.helpers.tiny_models import build

    folder = tmp_path_factory.mktemp("checkpoint")
    build(vocab_size=384).float().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder

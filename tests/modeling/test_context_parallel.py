"""Within torch's context_parallel a process has a part of each row, and multipole attention would not see the rest."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_multipole import multipole_attention, tensor_attention
from tests.helpers.processes import on_ranks
from tests.helpers.tiny_models import BLOCK, RANK, VOCABULARY, build, tokens


def _sharded(environment):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    os.environ |= environment
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, multipole={"block_size": BLOCK, "rank": RANK})
    stock = LlamaForCausalLM._from_config(config, attn_implementation="multipole").eval()
    own, tensor = build(), build(layer_types=["tensor_attention"])
    whole = tokens()[:, :64]
    ids, x = whole.clone(), torch.randn(1, 2, 32, 4)
    calls = {
        "own": lambda: own(ids, use_cache=False),
        "generating": lambda: own.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0),
        "tensor": lambda: tensor(ids, use_cache=False),
        "stock": lambda: stock(ids, use_cache=False),
        "multipole_attention": lambda: multipole_attention(x, x, x, block_size=BLOCK, rank=RANK),
        "tensor_attention": lambda: tensor_attention(x, (x, x), (x, x)),
    }
    expected = own(whole).logits
    with context_parallel(init_device_mesh("cpu", (2,)), buffers=[ids], buffer_seq_dims=[1]):
        assert ids.shape == (2, 32)
        for call in calls.values():
            with pytest.raises(ValueError, match="need whole rows, but torch's context_parallel"):
                call()
    # Outside of it nothing is left behind.
    torch.testing.assert_close(own(ids).logits, expected, atol=0, rtol=0)
    for call in calls.values():
        call()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_parts_of_rows_are_refused():
    assert on_ranks(2, _sharded) == [0, 0]

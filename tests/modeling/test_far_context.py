"""What learned summaries are for: a task whose answer lies beyond the near field, at one place in a group."""

import math

import pytest
import torch

from hf_multipole import MultipoleConfig, MultipoleForCausalLM

SYMBOLS, TOKENS, STEPS = 8, 64, 250
pytestmark = pytest.mark.slow


def trained_loss(**options) -> float:
    """Loss, in nats, of repeating at the end the first of 64 random symbols: chance is log(8).

    The mean of the first segment, eight tokens, says only how often each symbol stands in it.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "block_size": 8, "rank": 2}
    config = MultipoleConfig(vocab_size=SYMBOLS, max_position_embeddings=TOKENS, initializer_range=0.2, **sizes | options)
    model = MultipoleForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(SYMBOLS, (32, TOKENS))
        logits = model(tokens, logits_to_keep=1).logits[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) > 20 and sum(losses[-20:]) / 20 < 0.1:  # learned
            break
    return sum(losses[-20:]) / 20


@pytest.fixture(scope="module")
def losses():
    return {
        "hierarchical": trained_loss(far_bias_init=0.0),
        "direct": trained_loss(far_bias_init=0.0, summary="direct"),
        "linear": trained_loss(far_bias_init=0.0, layer_types=["multipole_linear_attention"]),
        "mean": trained_loss(far_bias_init=0.0, summary="mean"),
        "near": trained_loss(far_bias_init=-10000.0),
    }


def test_the_near_field_alone_is_at_chance(losses):
    assert losses["near"] > math.log(SYMBOLS) - 0.05


def test_means_know_how_often(losses):
    assert losses["mean"] < losses["near"] - 0.1


@pytest.mark.parametrize("kind", ["hierarchical", "direct", "linear"])
def test_learned_summaries_know_which(losses, kind):
    assert losses[kind] < losses["mean"] / 2

"""Tiny models with random parameters, for the tests of models and of generation.

They are in float64: learned summaries far from the mean, and a far bias that gives the far field its weight. 75 tokens in blocks
of 8 have three levels of groups, the last group of each ragged.
"""

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_multipole import (
    MultipoleConfig,
    MultipoleForCausalLM,
    MultipoleForMaskedLM,
    MultipoleForSequenceClassification,
    MultipoleForTokenClassification,
    MultipoleModel,
)

BLOCK, RANK, VOCABULARY, TOKENS = 8, 2, 50, 75
EXACT = 2 * BLOCK  # up to here, multipole attention is exact attention
HYBRID = ["multipole_attention", "full_attention", "multipole_attention"]
AUTO_CLASSES = {
    AutoModel: MultipoleModel,
    AutoModelForCausalLM: MultipoleForCausalLM,
    AutoModelForMaskedLM: MultipoleForMaskedLM,
    AutoModelForSequenceClassification: MultipoleForSequenceClassification,
    AutoModelForTokenClassification: MultipoleForTokenClassification,
}
# Same operations on the same numbers, in another order of summation.
CLOSE = {"atol": 1e-11, "rtol": 1e-9}


def tiny_config(**options) -> MultipoleConfig:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    fields = dict(block_size=BLOCK, rank=RANK, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if "layer_types" in options:
        options = options | {"num_hidden_layers": len(options["layer_types"])}
    # What has masses asks for them.
    return MultipoleConfig(**sizes | fields | {"far_bias_init": 0.0, "saliency": False} | options)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def build(cls=MultipoleForCausalLM, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return randomise(cls(tiny_config(**options))).to(dtype).eval()


def same_weights(model, **options):
    """The same parameters under another configuration."""
    other = type(model)(tiny_config(**options)).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def tokens(rows=2, n=TOKENS, seed=1):
    return torch.randint(3, VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(seed))


def pad(ids, left=0, right=0):
    """Padded ids and their mask. The padding is a token that the model could mistake for a real one."""
    mask = torch.ones_like(ids)
    return torch.nn.functional.pad(ids, (left, right), value=7), torch.nn.functional.pad(mask, (left, right))


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

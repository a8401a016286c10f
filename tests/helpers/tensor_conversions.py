"""Stock models that were converted to tensor attention, as if trained."""

import copy

import torch

from hf_multipole import convert
from hf_multipole.integration.tensor_branch import TensorBranch
from tests.helpers.stock_models import DECODERS, ENCODERS, auto_class_of, build

MODELS = DECODERS | ENCODERS
N = 21
WINDOWS = {"tensor_window": [3, 7]}
POLYNOMIAL = {"tensor_method": "polynomial", "tensor_score_dim": 3}
KINDS = [
    WINDOWS,
    {"tensor_window": [None, 2], "tensor_score_dim": 4, "tensor_entry_bound": 1.3},
    {"tensor_order": 2},
    {"tensor_order": 4, "tensor_window": [2, 3, 4]},
    POLYNOMIAL,
]


def stock(name="llama", implementation="sdpa"):
    """A model as Transformers runs it; those with a soft cap have no "sdpa"."""
    config = copy.deepcopy(MODELS[name])
    del config.multipole
    return build(config, auto_class_of(name), "eager" if name == "gemma2" else implementation)


def branches(model):
    return [module for module in model.modules() if isinstance(module, TensorBranch)]


def learned(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".tensor_branch." in name}


def change(model):
    """As if trained: open gates, and maps far from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.5)
    return model


def converted(name="llama", **options):
    return change(convert(stock(name), "tensor", **WINDOWS | options))


def padded_mask(ids, left=4, right=3):
    """Padding on the left of the first row, and on the right of the second."""
    mask = torch.ones_like(ids)
    mask[0, :left], mask[1, -right:] = 0, 0
    return mask

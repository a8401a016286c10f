"""Models whose linear layers are packed, as quantisation leaves them."""

import copy
import warnings

import torch
from torch import nn


class Packed(nn.Module):
    """As of GPTQ: integers and scales in buffers, and no ``weight``."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.qweight * self.scale).T


def pack(model):
    """A copy with packed linear layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Packed(child))
    assert not any(type(module) is nn.Linear for module in model.modules())
    return model


def quantize(model):
    """A copy with torch.ao's dynamically quantised linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch points to torchao
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)

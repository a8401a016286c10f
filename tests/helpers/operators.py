"""Custom operators, as torch.compile relies on them."""

import pytest
import torch


def check_operator(module, name: str, *calls, more: tuple[str, ...] = ()) -> None:
    """Schema, fake tensors and autograd of the operator ``module.name``, on the arguments that it gets in each of the calls."""
    seen = []
    real = getattr(module, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, lambda *arguments: seen.append(arguments) or real(*arguments))
        for call in calls:
            call()
    assert len(seen) == len(calls)
    for arguments in seen:
        leaves = (x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in arguments)
        utils = ("test_schema", "test_autograd_registration", "test_faketensor", *more)
        torch.library.opcheck(real, tuple(leaves), test_utils=utils)

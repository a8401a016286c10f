"""Operators of torch whose arguments are the fields of a named tuple: what an operator, its backward pass and their fakes take is
written once, as the annotations of the tuple.
"""

from collections.abc import Callable, Sequence
from typing import get_type_hints

import torch

_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
}


def refuse_onnx() -> None:
    """Raises ValueError while torch.onnx exports: no operator of these files has a form in ONNX."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "multipole and tensor attention have no operators in ONNX: export the model with exact attention, attn_implementation='sdpa', "
            "or by torch.export with a fixed length"
        )


def define(
    name: str,
    arguments: type,
    run: Callable,
    fake: Callable,
    run_backward: Callable | None = None,
    differentiable: Sequence[str] = (),
    outputs: int = 1,
    constants: Sequence[int] = (),
) -> Callable:
    """Defines an operator and, if there is one, its backward pass; it is called with the fields of a named tuple: ``operator(*given)``.

    name: ``namespace::name``, the namespace of this copy of the file: to define an operator again, when the code of a checkpoint is
    loaded too, breaks the first one. run: ``(arguments) -> tensor``, or a tuple of as many as ``outputs``. fake: the same, empty.
    run_backward: ``(arguments, gradients, tensors) -> gradients`` of the fields ``differentiable``, in their order; what it is given are
    the gradients of the outputs and, if there are several of these, the outputs and perhaps None for a gradient. constants: numbers of
    the outputs that have no gradient.
    """
    fields = ", ".join(f"{_TYPES[kind]} {field}" for field, kind in get_type_hints(arguments).items())
    several = outputs > 1
    kept = outputs if several else 0
    upper = [f"Tensor{'?' * several} grad_{i}" for i in range(outputs)] + [f"Tensor output_{i}" for i in range(kept)]

    def returns(tensors: int) -> str:
        return "Tensor" if tensors == 1 else f"({', '.join(['Tensor'] * tensors)})"

    def split(values: tuple):
        return arguments(*values[outputs + kept :]), values[:outputs], values[outputs : outputs + kept]

    def taken(values: tuple):
        refuse_onnx()
        return arguments(*values)

    forward = torch.library.custom_op(name, lambda *values: run(taken(values)), mutates_args=(), schema=f"({fields}) -> {returns(outputs)}")
    forward.register_fake(lambda *values: fake(taken(values)))
    if run_backward is None:
        return forward

    backward = torch.library.custom_op(
        f"{name}_backward",
        lambda *values: tuple(run_backward(*split(values))),
        mutates_args=(),
        schema=f"({', '.join(upper)}, {fields}) -> {returns(len(differentiable))}",
    )

    @backward.register_fake
    def _(*values):
        given = split(values)[0]
        tensors = [getattr(given, field) for field in differentiable]
        return tuple(tensors[0].new_empty(0) if x is None else torch.empty_like(x) for x in tensors)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*(output if several else ()), *(x for x in inputs if isinstance(x, torch.Tensor)))
        ctx.plain = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]
        ctx.set_materialize_grads(not several)
        ctx.mark_non_differentiable(*(output[i] for i in constants))

    def gradients(ctx, *upper):
        saved = iter(ctx.saved_tensors)  # asked for once: checkpointing hands them out once
        tensors = [next(saved) for _ in range(kept)]
        given = arguments(*(next(saved) if x is None else x[0] for x in ctx.plain))
        upper = (x if x is None else x.contiguous() for x in upper)
        found = dict(zip(differentiable, backward(*upper, *tensors, *given)))
        return tuple(found[name] if name in found and x is not None else None for name, x in given._asdict().items())

    forward.register_autograd(gradients, setup_context=save)
    return forward

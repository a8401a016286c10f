"""Every Triton kernel compiled for GPUs that need not be there: what the interpreter cannot see, types and resources.

    python -m tests.helpers.compiled_kernels 80 90  # a table of all dtypes and head dimensions, some minutes

Apart from the tests' own process, where Triton may have been imported with its interpreter.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource

from hf_multipole.modeling import multipole_triton, state_triton, summaries_triton
from hf_multipole.modeling.hierarchy import group_count, level_count

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}


class Resources(NamedTuple):
    kernel: str
    registers: int  # of a thread
    stack: int  # bytes of a thread that found no register
    shared: int  # bytes of a program


def compile_launch(kernel, arguments: dict, capability: int, num_warps: int = 4, num_stages: int = 2) -> Resources:
    """Compiles a kernel as its launch with these arguments would: specialised to None, 1 and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        value = arguments[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", capability, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(driver.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(kernel.__name__, int(registers), int(stack), compiled.metadata.shared)


def compile_all(capability: int, dtype: torch.dtype, dim: int, everything: bool) -> list[Resources]:
    """The kernels as one attention layer launches them, forward and backward, and one decoding step; ``everything`` that a call can
    have (bidirectional, packed, capped, sinks, masses), or as little as possible.
    """
    batch, heads, kv_heads, n, block_size, rank = 2, 4, 2, 1024, 64, 4
    levels = level_count(n, block_size)
    counts = [group_count(n, block_size, level + 1) for level in range(levels)]
    found = {}

    def launch(kernel, device, programs, arguments, **options):
        if kernel not in found:
            found[kernel] = compile_launch(kernel, arguments, capability, **options)

    for module in (multipole_triton, summaries_triton, state_triton):
        module.launch = launch

    def leaf(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, requires_grad=dtype.is_floating_point)

    # Heads between tokens, as projections leave them.
    q, k, v = (leaf(batch, n, h, dim, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    far_k, far_v = (leaf(batch, kv_heads, sum(counts) * rank, dim) for _ in range(2))
    bias, log_counts, document, first, sinks, masses = leaf(heads, levels), None, None, None, (None,) * 3, None
    if everything:
        sinks = [leaf(batch, kv_heads, n // block_size, 4, dim, dtype=dtype) for _ in range(2)]
        sinks, masses = (
            [*sinks, torch.zeros(batch, n // block_size, 4, dtype=torch.bool)],
            leaf(batch, kv_heads, n // block_size, block_size),
        )
        log_counts, document = leaf(batch, kv_heads, sum(counts) * rank), leaf(batch, n, dtype=torch.long)
        first = leaf(batch, n // block_size, dtype=torch.long)
    softcap, plain = (30.0 if everything else None), (block_size, rank, 0, not everything, True, dim**-0.5)
    out, lse = multipole_triton.attention(
        q, k, v, far_k, far_v, log_counts, bias, document, first, first, *sinks, [0] * levels, counts, *plain, softcap
    )
    used = [out, lse] if everything else [out]
    torch.autograd.backward(used, [torch.zeros_like(x) for x in used])
    groups, weight = k.detach().unflatten(2, (-1, block_size)), leaf(kv_heads, rank, block_size, dim, dtype=dtype).detach()
    grad = summaries_triton.depthwise_map(groups, weight, masses)
    summaries_triton.depthwise_map_backward_(groups.clone(), grad, groups, weight, masses, everything)
    lengths = torch.zeros(batch, dtype=torch.int32) if everything else None
    ring, groups_of_step = 3 * block_size, levels * 4 * rank
    held = 4 * everything, ring, 4, block_size, rank, True, 1.0, softcap
    slots = torch.zeros(batch, kv_heads, 4 * everything + ring + groups_of_step, dim)
    log_counts = torch.zeros(batch, kv_heads, groups_of_step) if everything else None
    state_triton.step(q[:, :, 0].detach(), slots, slots, lengths, 70, bias.detach(), None, *held, log_counts)
    resources = list(found.values())
    # That of the O(n) form is another one.
    found.clear()
    near, far = slots[:, :, : 4 * everything + ring], torch.zeros(batch, heads, 5, dim + 1)
    state_triton.step(q[:, :, 0].detach(), near, near, lengths, 70, None, far, *held, None)
    return resources + list(found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", type=int, nargs="+", help="80 for A100, 90 for H100")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--everything", type=int, nargs="+", default=[0, 1])
    o = parser.parse_args()
    for capability in o.capabilities:
        for dtype in o.dtypes:
            for dim in o.dims:
                for everything in o.everything:
                    for resources in compile_all(capability, getattr(torch, dtype), dim, bool(everything)):
                        case = {"capability": capability, "dtype": dtype, "dim": dim, "everything": bool(everything)}
                        print(json.dumps(case | resources._asdict()), flush=True)

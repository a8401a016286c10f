"""What the attention of one layer costs at least, from its definition: operations, bytes that must move, memory; nothing measured.

Kinds of attention: "full" (exact, never holding the weights of all pairs, as flash attention), "local" (the own block and the
neighbouring ones), "multipole" (O(n log n), hierarchical summaries), "multipole_linear" (O(n)), "linear" (arXiv 2006.16236, causal in
chunks), "nystrom" (arXiv 2102.03902, bidirectional only).

Operations are those of matrix products, two for each multiply-add, and of the summaries; softmax, masks and indices are not counted.
Near tokens count in whole blocks, far groups where a query sees them. A backward pass takes twice the operations of the forward one:
what computes the weights again, as fast implementations do, takes half a forward pass more. Bytes: every argument, result and
gradient once, and summaries each time they are written or read. Memory: what any implementation holds beside its arguments.
"""

import math
from typing import NamedTuple

from hf_multipole.modeling.hierarchy import group_count, level_count

KINDS = ("full", "local", "multipole", "multipole_linear", "linear", "nystrom")
MULTIPOLE = ("multipole", "multipole_linear")
PINV = 24  # products of landmarks x landmarks matrices in 6 iterations of the pseudo-inverse
SINGLE = 4  # bytes of a float32, which summaries, states and sums are kept in


class Layer(NamedTuple):
    """Sizes of one layer's attention."""

    n: int  # tokens of a row
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    itemsize: int = 4  # bytes of an entry
    block_size: int = 64
    rank: int = 4
    spare: int = 1  # blocks that a generation state can take back
    chunk: int = 64  # tokens of a chunk of linear attention
    landmarks: int = 64  # of Nystroem attention

    @property
    def query_bytes(self) -> int:
        """Of the queries, and of the output."""
        return self.batch * self.heads * self.n * self.head_dim * self.itemsize

    @property
    def key_bytes(self) -> int:
        """Of the keys, and of the values."""
        return self.batch * self.kv_heads * self.n * self.head_dim * self.itemsize


class Cost(NamedTuple):
    flops: int  # two for each multiply-add
    bytes: int  # that are read or written at least
    memory: int  # bytes held at the end beside the arguments; in a decoding step, those of the state


def near_pairs(layer: Layer, causal: bool) -> int:
    """Queries times tokens of their own and neighbouring blocks, whole blocks."""
    n, m = layer.n, layer.block_size
    if n <= 2 * m:
        return n * n
    before = m * (n - m)
    return m * n + before + (0 if causal else m * m * (group_count(n, m, 1) - 1))


def far_pairs(layer: Layer, causal: bool, shared: bool = False) -> int:
    """Queries times groups that they see, all levels together; ``shared``: of each group ``rank`` queries, as in the O(n) form."""
    total = 0
    for level in range(1, level_count(layer.n, layer.block_size) + 1):
        groups, width = group_count(layer.n, layer.block_size, level), layer.block_size << (level - 1)
        tokens = width // layer.rank if shared else 1  # of a query
        # Group i >= 2 sees one group before it where i is even, two where it is odd; seeing is mutual.
        before = groups - 2 + groups // 2 - 1
        missing = groups * (width // tokens) - -(-layer.n // tokens)  # queries of the last group
        total += (1 if causal else 2) * before * (width // tokens) - missing * (1 + (groups - 1) % 2)
    return total


def pairs(kind: str, layer: Layer, causal: bool = True) -> int:
    """Queries times columns of the softmax, for one head of one row."""
    n, exact = layer.n, near_pairs(layer, causal)
    if kind == "full":
        return n * (n + 1) // 2 if causal else n * n
    if kind == "local":
        return exact
    if kind == "multipole":
        return exact + layer.rank * far_pairs(layer, causal)
    if kind == "multipole_linear":
        # The far result of its segment is one column more for each token.
        return exact + layer.rank * far_pairs(layer, causal, True) + (n if level_count(n, layer.block_size) else 0)
    raise ValueError(f"{kind!r} has no softmax over columns")


def summaries(layer: Layer) -> int:
    """Summary vectors of the keys, or of the values, of one head of one row."""
    levels = level_count(layer.n, layer.block_size)
    return layer.rank * sum(group_count(layer.n, layer.block_size, level) for level in range(1, levels + 1))


def far_bytes(kind: str, layer: Layer) -> int:
    """Of the summaries, and of the far results of all segments in the O(n) form: float32."""
    if kind not in MULTIPOLE:
        return 0
    vectors = 2 * layer.kv_heads * summaries(layer) * layer.head_dim
    results = layer.heads * summaries(layer) * (layer.head_dim + 1) if kind == "multipole_linear" else 0
    return layer.batch * SINGLE * (vectors + results)


def forward_flops(kind: str, layer: Layer, causal: bool) -> int:
    n, dim, rank = layer.n, layer.head_dim, layer.rank
    if kind == "linear":
        sums, chunk = 2 * dim * (dim + 1), layer.chunk * (2 * dim + 1) if causal else 0
        return 2 * layer.batch * layer.heads * n * (sums + chunk)
    if kind == "nystrom":
        marks = layer.landmarks
        products = 4 * n * marks * dim + n * marks**2 + marks**2 * dim + PINV * marks**3
        return 2 * layer.batch * layer.heads * products
    flops = 4 * layer.batch * layer.heads * dim * pairs(kind, layer, causal)
    if kind in MULTIPOLE and level_count(n, layer.block_size):
        # Every token, and every child, to each of rank summaries.
        children = 2 * (summaries(layer) - rank * group_count(n, layer.block_size, 1))
        flops += 4 * layer.batch * layer.kv_heads * dim * rank * (n + children)
    return flops


def forward(kind: str, layer: Layer, causal: bool = True) -> Cost:
    """A forward pass that keeps what a backward pass needs."""
    check(kind, causal)
    far = far_bytes(kind, layer)
    normalizers = layer.batch * layer.heads * layer.n * SINGLE  # of each query, the sum that its weights were divided by
    moved = 2 * layer.query_bytes + 2 * layer.key_bytes + 2 * far
    return Cost(forward_flops(kind, layer, causal), moved, layer.query_bytes + normalizers + far)


def both(kind: str, layer: Layer, causal: bool = True) -> Cost:
    """A forward and a backward pass; the gradient of the output is an argument."""
    first, far = forward(kind, layer, causal), far_bytes(kind, layer)
    moved = 6 * layer.query_bytes + 6 * layer.key_bytes + 5 * far
    return Cost(3 * first.flops, moved, first.memory + layer.query_bytes + 2 * layer.key_bytes + far)


def decode(kind: str, layer: Layer) -> Cost:
    """One more token in every row, with ``n`` tokens behind it: its attention on the state, which is read once."""
    check(kind, True)
    rows, dim, levels = layer.batch * layer.kv_heads, layer.head_dim, level_count(layer.n + 1, layer.block_size)
    if kind == "linear":
        state = rows * dim * (dim + 1) * SINGLE
        return Cost(2 * (layer.heads + layer.kv_heads) * layer.batch * dim * (dim + 1), 2 * state, state)
    if kind in MULTIPOLE:
        slots = (2 + layer.spare) * layer.block_size + levels * (3 + layer.spare) * layer.rank
        state = 2 * rows * slots * dim * SINGLE
        if kind == "multipole_linear":
            slots = (2 + layer.spare) * layer.block_size + 1
            state += layer.batch * layer.heads * levels * (layer.spare * layer.rank + 1) * (dim + 1) * SINGLE
    else:
        slots = layer.n if kind == "full" else min(layer.n, 2 * layer.block_size)
        state = 2 * rows * slots * dim * layer.itemsize
    return Cost(4 * layer.batch * layer.heads * slots * dim, state, state)


def exchange(kind: str, layer: Layer, devices: int, backward: bool = False) -> tuple[int, int]:
    """Bytes that a device receives when rows are cut into ``devices`` consecutive parts, and messages one after another.

    "full" is ring attention (arXiv 2310.01889): all keys and values go round, in a backward pass once more and with their gradients.
    Multipole attention, causal: the last block of the part before; of each level at most four groups, for the lists of the queries and to
    complete groups that lie on several devices; in the O(n) form the far result of the segment that began elsewhere. In a backward pass
    the gradients of all that go back. Messages: what neighbours need, a round for each level that is wider than a part, whose groups are
    completed in pairs, and the lists; in the O(n) form results come down these levels in as many rounds.
    """
    if devices == 1:
        return 0, 0
    rows, times = layer.batch * layer.kv_heads, 2 if backward else 1
    if kind == "full":
        return (3 if backward else 1) * 2 * layer.key_bytes * (devices - 1) // devices, times * (devices - 1)
    if kind not in MULTIPOLE:
        raise ValueError(f"no exchange is worked out for {kind!r}")
    levels = level_count(layer.n, layer.block_size)
    block = 2 * rows * layer.block_size * layer.head_dim * layer.itemsize
    groups = 2 * rows * levels * 4 * layer.rank * layer.head_dim * SINGLE
    results = layer.batch * layer.heads * (layer.head_dim + 1) * SINGLE if kind == "multipole_linear" else 0
    return times * (block + groups + results), times * (2 + math.ceil(math.log2(devices)) * (2 if results else 1))


def check(kind: str, causal: bool) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    if kind == "nystrom" and causal:
        raise ValueError("nystrom is bidirectional: pass causal=False; it has no decoding step")

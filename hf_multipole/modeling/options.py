"""Options of multipole and of tensor attention: their names, types, defaults, words and checks, stated once. Free of torch.

A field of :class:`MultipoleOptions` or :class:`TensorOptions` is, as its ``uses`` say,

- "own": a field of :class:`MultipoleConfig`,
- "stock": a key of ``config.multipole`` in models of other kinds,
- "convert": a keyword argument of :func:`hf_multipole.convert`, and an option of the command line (``add_arguments(parser)``),
- "operator": an argument of :func:`multipole_attention` or :func:`tensor_attention`.

``fields_of(use)`` lists them by the names that they have outside, where those of tensor attention begin with ``tensor_``. Whoever adds an
option adds a field here, and the code of what it does.
"""

import argparse
import difflib
import inspect
import math
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType
from typing import Any, ClassVar

USES = ("own", "stock", "convert", "operator")
SUMMARIES = ("hierarchical", "direct", "mean")
# The largest degree of a polynomial for tensor attention.
MAX_DEGREE = 24


def _option(default, words: str, check: Callable[[Any], bool], expected: str, uses: Sequence[str] = USES, **defaults) -> Any:
    """A field. words: its one help text. check: whether a value can be used, and else what was ``expected``. defaults: those of single
    uses, where they differ; ``convert`` leaves the others as ``config.multipole`` has them.
    """
    return field(default=default, metadata={"help": words, "check": check, "expected": expected, "uses": uses, "defaults": defaults})


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return choices.__contains__, " or ".join(map(repr, choices)) if len(choices) < 3 else f"one of {', '.join(map(repr, choices))}"


def _is_integer(x, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _is_finite(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_flag(x) -> bool:
    return isinstance(x, bool)


class _Options:
    """What both have."""

    prefix: ClassVar[str]
    stated: ClassVar[tuple[Field, ...]]
    checks: ClassVar[tuple[tuple[str, Callable[[Any], bool], str], ...]]  # of each field; torch.compile cannot read its metadata

    def __post_init__(self):
        for name, check, expected in self.checks:
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not check(value):
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(f"{name} is {shown!r}, but must be {expected}")

    @classmethod
    def of(cls, values: Mapping[str, Any]):
        """The options that are found by their outside names in a mapping, which may hold others; defaults for the rest.

        Raises ValueError for a value that is out of range.
        """
        given = {f.name: values[cls.prefix + f.name] for f in cls.stated if cls.prefix + f.name in values}
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{cls.prefix}{error}") from None

    def outside(self, use: str) -> dict[str, Any]:
        """The values by their outside names, as JSON has them."""
        values = {name: getattr(self, f.name) for name, f in fields_of(use, type(self)).items()}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


@dataclass(frozen=True)
class MultipoleOptions(_Options):
    """Options of multipole attention. Raises ValueError for a value that is out of range."""

    prefix: ClassVar[str] = ""

    block_size: int = _option(
        64,
        "tokens in a block of the exact near field, and in a group of the first level",
        lambda x: _is_integer(x, 1),
        "a positive integer",
    )
    rank: int = _option(4, "summaries of each far group; divides block_size", lambda x: _is_integer(x, 1), "a positive integer")
    summary: str = _option(
        "mean",
        'how groups are summarised: "hierarchical" (learned, any length), "direct" (learned for each level, as in the paper; at most '
        'max_position_embeddings tokens) or "mean" (nothing learned)',
        *_one_of(*SUMMARIES),
        uses=("own", "stock", "convert"),
        own="hierarchical",
        convert="hierarchical",
    )
    size_weighting: bool = _option(True, "adds log(c) to the logit of a summary that stands for c tokens", _is_flag, "true or false")
    far_bias_init: float | int | None = _option(
        None,
        "start of the learned bias of the far logits, one for each head and level; None for no bias. Well below 0, the far field does not "
        "drown the near one before its summaries mean something",
        lambda x: x is None or _is_finite(x),
        "a finite number, or None for no bias",
        uses=("own", "stock", "convert"),
        own=-10.0,
        convert=0.0,
    )
    sink_tokens: int | None = _option(
        0,
        "first tokens of each row or document that every later query sees exactly, and that are in no summary: pretrained decoders need "
        "them. None for 4 in causal models, and 0 in others",
        lambda x: x is None or _is_integer(x, 0),
        "an integer of at least 0, or None",
        stock=None,
    )
    saliency: bool = _option(
        False,
        "tokens have learned masses, a head: what their summaries keep of them. They start at 1, which changes nothing",
        _is_flag,
        "true or false",
        uses=("own", "stock", "convert"),
        own=True,
    )
    rotate_summaries: bool = _option(
        False,
        "keys are summarised before the rotary embedding, and each summary is rotated at its segment's centre. Otherwise the rotated keys "
        "are summarised. Queries are summarised after their rotation in any case",
        _is_flag,
        "true or false",
        uses=("own",),
    )
    downsample_queries: bool = _option(
        False,
        "the O(n) form, in which tokens of a segment share the query of their far field",
        _is_flag,
        "true or false",
        uses=("stock", "operator"),
    )
    layers: list | tuple | None = _option(
        None,
        "numbers of the layers that get the other attention, from 0; all by default. Others, and those with a sliding window, stay exact",
        lambda x: x is None or (isinstance(x, tuple) and bool(x) and all(_is_integer(layer, 0) for layer in x)),
        "a list of layer numbers, or None for all",
        uses=("stock", "convert"),
        convert=None,
    )

    def __post_init__(self):
        super().__post_init__()
        size, rank = self.block_size, self.rank
        if size % rank:
            raise ValueError(f"rank {rank} does not divide block_size {size}: each summary starts as the mean of block_size / rank tokens")

    def sinks(self, causal: bool) -> int:
        """Number of sink tokens."""
        return (4 if causal else 0) if self.sink_tokens is None else self.sink_tokens

    @property
    def is_learned(self) -> bool:
        """Whether they ask for parts that a layer learns."""
        return self.summary != "mean" or self.far_bias_init is not None or self.saliency


@dataclass(frozen=True)
class TensorOptions(_Options):
    """Options of tensor attention. Raises ValueError for a value that is out of range, or that belongs to the other method."""

    prefix: ClassVar[str] = "tensor_"

    order: int = _option(
        3,
        "tokens that a score joins, the query among them: 3 for pairs of keys, 2 for ordinary attention",
        lambda x: _is_integer(x, 2),
        "at least 2",
        uses=("own", "stock", "convert"),
    )
    method: str = _option("exact", '"exact" or "polynomial" (O(n), for bounded entries)', *_one_of("exact", "polynomial"))
    window: list | tuple | None = _option(
        None,
        "for each of the order - 1 indices, how many tokens up to and with the query it may take, or None for all; for the exact method, "
        "which takes O(n ** order) time without",
        lambda x: x is None or isinstance(x, tuple),
        "a list of widths, or None for all tokens",
    )
    degree: int | None = _option(
        None,
        "of the polynomial; by default the least one with a relative error of at most 1e-3",
        lambda x: x is None or (_is_integer(x, 0) and x <= MAX_DEGREE),
        f"an integer from 0 to {MAX_DEGREE}, or None to choose it",
    )
    entry_bound: float | int | None = _option(
        None,
        "queries and keys are normalised, with a learned gain, so that no entry exceeds it. 0.7 by default for the polynomial, which needs "
        "one; None leaves them as they are",
        lambda x: x is None or (_is_finite(x) and x > 0),
        "a positive number, or None",
    )
    score_dim: int | None = _option(
        None,
        "width of queries and keys. By default 8 for the polynomial, whose features are C(score_dim + degree, degree), and head_dim "
        "otherwise. Scores are scaled by its inverse square root",
        lambda x: x is None or _is_integer(x, 1),
        "positive",
        uses=("own", "stock", "convert"),
    )

    def __post_init__(self):
        super().__post_init__()
        indices = self.order - 1
        if self.window is not None and len(self.window) != indices:
            raise ValueError(f"window is {list(self.window)!r}, but must have one width, or None, for each of the {indices} keys")
        for width in self.window or ():
            if width is not None and not _is_integer(width, 1):
                raise ValueError(f"window has width {width!r}, but widths must be positive integers, or None for all tokens")
        if self.method == "exact" and self.degree is not None:
            raise ValueError("degree belongs to method='polynomial': leave it out, or set that method")
        if self.method == "polynomial" and self.window is not None:
            raise ValueError("window belongs to method='exact': the near-linear path has no single weights; leave it out")

    def completed(self, head_dim: int) -> "TensorOptions":
        """With the defaults that depend on other options."""
        polynomial = self.method == "polynomial"
        # With a score_dim of 8 and order 3, a degree of 4 and 495 features.
        bound = 0.7 if polynomial and self.entry_bound is None else self.entry_bound
        return replace(self, entry_bound=bound, score_dim=self.score_dim or (8 if polynomial else head_dim))


CLASSES = (MultipoleOptions, TensorOptions)
for _class in CLASSES:
    _class.stated = fields(_class)
    _class.checks = tuple((f.name, f.metadata["check"], f.metadata["expected"]) for f in fields(_class))


def fields_of(use: str, *classes: type[_Options]) -> dict[str, Field]:
    """The fields of a use by their outside names; of both classes, or of those that are named."""
    return {cls.prefix + f.name: f for cls in classes or CLASSES for f in cls.stated if use in f.metadata["uses"]}


def default_of(f: Field, use: str) -> Any:
    defaults = f.metadata["defaults"]
    # What convert is not given is as in config.multipole.
    return defaults.get(use, defaults.get("stock", f.default) if use == "convert" else f.default)


def described(use: str) -> str:
    """The help of all fields of a use, as the ``Args`` of a docstring, after the indentation of its first line."""
    entries = []
    for name, f in fields_of(use).items():
        default = default_of(f, use)
        told = "" if default is None else f" ({default!r} by default)"
        entries.append(textwrap.fill(f"{name}: {f.metadata['help']}{told}.", 140, initial_indent=" " * 8, subsequent_indent=" " * 12))
    return "\n".join(entries).lstrip()


def takes_options(use: str) -> Callable:
    """For a function with ``**options``: the fields of a use in its signature, and in its docstring, in place of ``{options}``."""

    def state(function: Any) -> Callable:
        *before, _ = inspect.signature(function).parameters.values()
        kinds: dict[str, Any] = {name: f.type for name, f in fields_of(use).items()}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=f.metadata["defaults"].get(use), annotation=kinds[name] | None)
            for name, f in fields_of(use).items()
        ]
        function.__signature__ = inspect.signature(function).replace(parameters=[*before, *keywords])
        function.__doc__ = (function.__doc__ or "").replace("{options}", described(use))
        return function

    return state


def nearest(name: str, known) -> str:
    """What to add to a message about an unknown name."""
    near = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``convert`` to a command line, a group for each class: None where nothing was given."""
    for cls in CLASSES:
        group = parser.add_argument_group(cls.__name__.removesuffix("Options").lower() + " attention")
        for name, f in fields_of("convert", cls).items():
            default = default_of(f, "convert")
            words = f.metadata["help"].replace("%", "%%") + ("" if default is None else f" ({default} by default)")
            group.add_argument("--" + name.replace("_", "-"), dest=name, default=None, help=words, **_argument(f))


def _argument(f: Field) -> dict[str, Any]:
    """How argparse reads a field."""
    kinds = [kind for kind in typing.get_args(f.type) or (f.type,) if kind is not NoneType]
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if list in kinds:
        return {"nargs": "+", "type": _integer_or_all, "metavar": "N"}
    choices = getattr(f.metadata["check"], "__self__", None)
    return {"choices": choices} if choices else {"type": kinds[0], "metavar": "N" if kinds[0] is int else "X"}


def _integer_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)

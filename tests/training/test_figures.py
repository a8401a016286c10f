"""Pictures: ticks that a person reads, labels that do not overlap, one colour for a method."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_multipole import token_masses
from hf_multipole.training import figures
from tests.helpers.tiny_models import build

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize(
    "values", [(1, 2), (9.0, 11.0), (1, 2, 4, 8, 16, 32), (64, 1024), (1024, 65536), (4096, 2**20), (0.11, 230), (3e-5, 4e3)]
)
def test_logarithmic_axes_have_three_ticks_in_plain_numbers(tmp_path, values, base):
    with figures.figure(tmp_path / "a.png") as (picture, ((axes,),)):
        axes.plot(values, values)
        axes.set_xscale("log", base=base)
        axes.set_yscale("log", base=base)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [x for x in axis.get_majorticklocs() if low <= x <= high]
        texts = [label.get_text() for label in axis.get_majorticklabels()]
        assert 3 <= len(ticks) <= 10 and len(set(texts)) == len(texts)
        assert not any("$" in text or "^" in text for text in texts)


def test_numbers_on_axes():
    assert [figures.short(x) for x in (0.05, 2.0, 500.0, 1000.0, 1500.0, 20000.0, 1e6)] == ["0.05", "2", "500", "1k", "1,500", "20k", "1M"]
    assert [figures.short(x, 1024) for x in (512.0, 1024.0, 16384.0, 2.0**20)] == ["512", "1k", "16k", "1M"]


@pytest.mark.parametrize("values", [[1.0] * 8, [1.0, 1.01, 1.02, 5.0, 9.0, 9.01, 9.02], [3.0]])
def test_labels_at_the_ends_do_not_overlap(tmp_path, values):
    with figures.figure(tmp_path / "a.png") as (picture, ((axes,),)):
        for i, value in enumerate(values):
            axes.plot([0, 1], [1, value], label=f"line {i}")
        figures.label_ends(axes)
    from matplotlib.text import Text

    picture.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == len(values)
    assert all(below.y1 <= above.y0 + 0.5 for below, above in zip(boxes, boxes[1:]))
    assert all(box.x1 <= picture.bbox.x1 for box in boxes)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted))
def test_spread_apart(places):
    """No nearer than the gap, in order, and moved only where something was too near."""
    found = figures.spread_apart(places, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(found, found[1:]))
    if all(b - a >= 0.1 for a, b in zip(places, places[1:])):
        assert found == pytest.approx(places)
    assert sum(found) == pytest.approx(sum(places))


def test_a_method_has_one_colour():
    """Whatever it is called, and whatever else is in the picture; two kinds of one method can be told apart."""
    exact, multipole, window, linear = (
        ("sdpa", "full attention", "exact"),
        ("multipole", "this model"),
        ("near", "near field only"),
        ("linear",),
    )
    for names in (exact, multipole, window, linear):
        assert len({figures.colours(["other", name])[name] for name in names}) == 1
    (exact,), (other,) = (figures.colours([name]).values() for name in ("sdpa-bidirectional", "multipole-direct"))
    assert exact == figures.colours(["sdpa"])["sdpa"] != other
    assert len(set(figures.colours(["near", "linear", "multipole-linear", "local"]).values())) == 4
    together = figures.colours(["multipole", "multipole, rank 16", "multipole, O(n)", "linear attention", "full attention", "other"])
    assert len(set(together.values())) == 6


def test_weights_of_tokens_are_weights():
    """A summary's weight is spread over its tokens, so that each query's weights are still 1 in all."""
    model, n = build(vocab_size=384).float().eval(), 100
    attentions = model(torch.randint(384, (1, n)), output_attentions=True).attentions
    for weights in attentions:
        spread = figures.token_weights(weights[0], n, model.config.block_size, model.config.rank)
        # The last group may be part empty: its tokens past the row have no weight here.
        torch.testing.assert_close(spread.sum(-1), torch.ones(spread.shape[:-1]), rtol=0, atol=1e-5)
        assert not spread.triu(1).any()


def test_the_attention_picture(tmp_path):
    figures.plot_attention(build(vocab_size=384).float().eval(), torch.randint(384, (1, 60)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_picture_of_masses(tmp_path):
    model, ids = build(saliency=True), torch.arange(40)[None]
    masses = {name: x[0] for name, x in token_masses(model, input_ids=ids).items()}
    figures.plot_masses(masses, ids[0] % 9 == 4, tmp_path / "masses.png")
    assert (tmp_path / "masses.png").stat().st_size > 10_000

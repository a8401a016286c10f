"""What a model makes of its inputs: padding, packed rows, positions; and what it refuses."""

import pytest
import torch
from transformers import DynamicCache

from hf_multipole import (
    MultipoleCache,
    MultipoleForSequenceClassification,
    MultipoleModel,
)
from tests.helpers.tiny_models import (
    AUTO_CLASSES,
    BLOCK,
    CLOSE,
    EXACT,
    HYBRID,
    TOKENS,
    build,
    gradients,
    pad,
    positions,
    tokens,
)

# Rotary angles are float32, as everywhere in Transformers.
SHIFTED = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def ids():
    return tokens()


# Padding and packing


@pytest.mark.parametrize("cls", list(AUTO_CLASSES.values()))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotate_summaries", [True, False])
@pytest.mark.slow
def test_a_row_alone_is_the_row_in_a_batch(cls, side, causal, rotate_summaries):
    model = build(cls, is_causal=causal, rotate_summaries=rotate_summaries, layer_types=HYBRID, num_labels=3)
    lengths = (TOKENS, 41, EXACT + 1, 1)
    rows = [tokens(rows=1, n=n, seed=n) for n in lengths]
    padded = [pad(row, **{side: TOKENS - row.shape[1]}) for row in rows]
    ids, mask = (torch.cat(parts) for parts in zip(*padded))
    if cls is MultipoleForSequenceClassification:
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)  # that is how it finds the last token
    for position_ids in (positions(mask), None):
        together = model(ids, attention_mask=mask, position_ids=position_ids)[0]
        assert together.isfinite().all()
        for row, alone in enumerate(rows):
            expected = model(alone)[0][0]
            got = together[row] if cls is MultipoleForSequenceClassification else together[row, mask[row].bool()]
            torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [75, 80, 40])
def test_rotated_summaries_are_a_matter_of_distances(causal, n):
    """Wherever a row begins; the last group may be of any length."""
    model = build(MultipoleModel, is_causal=causal, rotate_summaries=True)
    ids, position_ids = tokens(n=n), torch.arange(n)[None]
    torch.testing.assert_close(model(ids, position_ids=position_ids + 99)[0], model(ids)[0], **SHIFTED)


def test_what_stands_in_padding_does_not_matter(ids):
    model = build(MultipoleModel, is_causal=False)
    ids, mask = pad(ids, left=9, right=4)
    embeddings = model.get_input_embeddings()(ids)
    plain = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state[mask.bool()]
    wild = embeddings.masked_fill(mask[..., None] == 0, torch.nan)
    torch.testing.assert_close(model(inputs_embeds=wild, attention_mask=mask).last_hidden_state[mask.bool()], plain, atol=0, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotate_summaries", [True, False])
@pytest.mark.parametrize("layer_types", [["multipole_attention"] * 2, ["full_attention"] * 2, HYBRID])
@pytest.mark.parametrize("implementation", ["multipole", "sdpa"])
@pytest.mark.parametrize("lengths", [(30, 45), (3, 40, 1, 31), (BLOCK, 50, EXACT + 1)])
@pytest.mark.slow
def test_packed_documents_are_documents_alone(causal, rotate_summaries, layer_types, implementation, lengths):
    model = build(
        MultipoleModel, is_causal=causal, rotate_summaries=rotate_summaries, layer_types=layer_types, attn_implementation=implementation
    )
    n = sum(lengths)
    ids = tokens(rows=2, n=n)
    alone = torch.cat([model(part).last_hidden_state for part in ids.split(lengths, 1)], 1)
    assert (model(ids).last_hidden_state - alone).abs().max() > 1e-3
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    torch.testing.assert_close(model(ids, position_ids=position_ids).last_hidden_state, alone, **CLOSE)
    one = {"input_ids": ids[:1], "cu_seq_lens_q": bounds.int()}
    torch.testing.assert_close(model(**one, position_ids=position_ids).last_hidden_state, alone[:1], **CLOSE)
    torch.testing.assert_close(model(**one).last_hidden_state, alone[:1], **CLOSE)


def test_packed_rows_may_differ_and_train():
    """Two rows cut in different places: outputs and gradients are those of the documents in rows of their own."""
    model = build()
    ids = tokens(rows=2, n=72)
    cuts = ((32, 40), (17, 5, 50))
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in cuts])
    model(ids, position_ids=position_ids).logits.square().sum().backward()
    packed = gradients(model)
    model.zero_grad()
    sum(model(part[None]).logits.square().sum() for row, lengths in zip(ids, cuts) for part in row.split(lengths)).backward()
    torch.testing.assert_close(packed, gradients(model), atol=1e-8, rtol=1e-8)


def test_one_document_is_not_packed(ids):
    model = build()
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=torch.arange(TOKENS)[None]).logits, plain, atol=0, rtol=0)


@pytest.mark.parametrize("layer_types", [["multipole_attention"], ["multipole_linear_attention"], HYBRID])
def test_packed_rows_stay_apart_with_a_mask(layer_types):
    """A mask of ones, and one of padding around the documents, beside positions that start anew."""
    model = build(layer_types=layer_types)
    lengths = (40, 35)
    ids = tokens(n=sum(lengths))
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    for left, right in ((0, 0), (9, 0), (0, 9), (3, 4)):
        padded, mask = pad(ids, left, right)
        packed = torch.nn.functional.pad(position_ids, (left, right), value=1)
        for rows in (packed, packed.expand(len(ids), -1)):
            got = model(padded, attention_mask=mask, position_ids=rows).logits[:, left : left + sum(lengths)]
            torch.testing.assert_close(got, alone, **CLOSE)


# What is refused


@pytest.mark.parametrize("layer_types", [["multipole_attention"], ["full_attention"]])
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool),
        torch.zeros(2, TOKENS),
        torch.ones(2, TOKENS) / 2,
        torch.ones(2, TOKENS + 5, dtype=torch.long),
        torch.ones(2, TOKENS - 5, dtype=torch.long),
        torch.ones(1, TOKENS, dtype=torch.long),
    ],
    ids=["4-D", "additive", "float", "longer", "shorter", "other batch"],
)
def test_masks_of_a_wrong_kind(ids, mask, layer_types):
    with pytest.raises(ValueError, match=r"attention_mask has shape .* must be \(batch, n\) = \(2, 75\)"):
        build(layer_types=layer_types)(ids, attention_mask=mask)


def test_a_mask_of_0_and_1_in_floating_point(ids):
    """PEFT makes such ones, with virtual tokens before the others."""
    model, mask = build(), torch.ones(2, TOKENS)
    mask[0, :20] = 0
    assert torch.equal(model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask.bool()).logits)


@pytest.mark.parametrize("layer_types", [["multipole_attention"], ["full_attention"], ["tensor_attention"]])
def test_a_mask_of_other_numbers(ids, layer_types):
    """Numbers of documents, say, would be taken for ones, and merge them."""
    model, mask = build(layer_types=layer_types), torch.ones_like(ids)
    mask[1, 30:] = 2
    with pytest.raises(ValueError, match="attention_mask holds 2, but must be 1 for real tokens.*position_ids"):
        model(ids, attention_mask=mask)
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask holds 2"):
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)


def test_positions_of_a_wrong_kind(ids):
    model, right = build(), torch.arange(TOKENS)
    for wrong in (right, right[None, None], right[None].expand(3, -1), right[None, 1:], right[:4], torch.zeros(4, 2, TOKENS).long()):
        with pytest.raises(ValueError, match=r"position_ids have shape .* must be \(batch, tokens\) = \(2, 75\)"):
            model(ids, position_ids=wrong)
    with pytest.raises(ValueError, match="position_ids have dtype torch.float32, but must be integers"):
        model(ids, position_ids=right[None].float())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cache", [MultipoleCache, DynamicCache])
def test_packed_rows_have_no_cache(ids, cache, masked):
    model = build()
    options = {"position_ids": torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])[None]}
    options |= {"attention_mask": torch.ones_like(ids)} if masked else {}
    with pytest.raises(ValueError, match="position_ids start anew within a row.*use_cache=False"):
        model(ids, past_key_values=cache(config=model.config), **options)


def test_a_mask_with_a_hole(ids):
    mask = torch.ones_like(ids)
    mask[1, 30] = 0
    with pytest.raises(ValueError, match="attention_mask has a hole in row 1.*to one side"):
        build()(ids, attention_mask=mask)


def test_empty_and_ambiguous_input(ids):
    model = build()
    for empty in (ids[:, :0], ids[:0]):
        with pytest.raises(ValueError, match="input is empty"):
            model(empty)
    embeddings = model.get_input_embeddings()(ids)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


def test_packed_rows_by_bounds_are_one_row(ids):
    bounds = torch.tensor([0, 30, TOKENS])
    with pytest.raises(ValueError, match="cu_seq_lens_q.*position_ids"):
        build()(ids, cu_seq_lens_q=bounds)

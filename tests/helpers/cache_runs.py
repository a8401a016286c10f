"""Kinds of models whose generation state is tested, and texts that come in pieces."""

import torch

from tests.helpers.tiny_models import BLOCK, HYBRID

KINDS = [{"summary": "hierarchical"}, {"summary": "mean"}, {"summary": "direct"}, {"rotate_summaries": True}]
KINDS += [{"summary": "direct", "rotate_summaries": True}, {"max_position_embeddings": 4 * BLOCK}]
LINEAR = ["multipole_linear_attention"] * 2
KINDS += [{"layer_types": LINEAR, "summary": kind} for kind in ("hierarchical", "direct")]
KINDS += [{"sink_tokens": 3}, {"saliency": True, "sink_tokens": 2 * BLOCK + 1}, {"saliency": True, "summary": "direct"}]
KINDS += [{"layer_types": LINEAR, "saliency": True, "sink_tokens": 4, "rotate_summaries": False}]
FULL_FIRST = HYBRID[1:]


def run(model, ids, chunks, mask=None, cache=None, **kwargs):
    """Logits of a text that comes in pieces, and the cache."""
    done, logits = 0 if cache is None else cache.get_seq_length(), []
    first = done
    with torch.no_grad():
        for chunk in chunks:
            part = slice(done, done + chunk)
            done += chunk
            inputs = {} if mask is None else {"attention_mask": mask[:, :done]}
            out = model(ids[:, part], past_key_values=cache, use_cache=True, **inputs, **kwargs)
            cache = out.past_key_values
            assert cache.get_seq_length() == done
            logits.append(out.logits)
    assert done <= ids.shape[1] and first < done
    return torch.cat(logits, 1), cache


def states(cache):
    return [layer.state for layer in cache.layers if getattr(layer, "state", None) is not None]

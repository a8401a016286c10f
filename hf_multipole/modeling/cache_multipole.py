"""Generation state of multipole layers."""

from transformers.cache_utils import DynamicLayer


class MultipoleLayer(DynamicLayer):
    """Keeps all keys and values, so that every step gives the logits of the full forward pass."""

    _layer_type = "multipole_attention"

"""Generation state of multipole layers."""

from transformers.cache_utils import DynamicLayer, StaticLayer


class MultipoleLayer(DynamicLayer):
    """Keeps all keys and values, so that every step gives the logits of the full forward pass."""

    _layer_type = "multipole_attention"


class MultipoleStaticLayer(StaticLayer):
    """Says clearly that there is none."""

    _layer_type = "multipole_attention"

    def __init__(self, *args, **kwargs):
        raise ValueError("multipole attention has no static cache; leave out cache_implementation='static'")

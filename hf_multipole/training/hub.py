"""Checkpoints for the Hub: the files that run the model travel with the weights, so that nobody needs this package."""

import os

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

AUTO_MAP = {
    "AutoConfig": "configuration_multipole.MultipoleConfig",
    "AutoModel": "modeling_multipole.MultipoleModel",
    "AutoModelForCausalLM": "modeling_multipole.MultipoleForCausalLM",
    "AutoModelForMaskedLM": "modeling_multipole.MultipoleForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_multipole.MultipoleForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_multipole.MultipoleForTokenClassification",
}


def save_with_code(model: PreTrainedModel, folder: str | os.PathLike, **options) -> None:
    """``model.save_pretrained(folder, **options)`` and the code, for ``from_pretrained(folder, trust_remote_code=True)``.

    Every head is entered, not only the one that is saved: a causal checkpoint can be loaded under another one.
    """
    model.config.auto_map = dict(AUTO_MAP)
    try:
        model.save_pretrained(folder, **options)
    finally:
        del model.config.auto_map
    custom_object_save(model, folder)

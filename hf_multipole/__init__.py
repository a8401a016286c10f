"""Fast multipole attention for Transformers.

Importing this package registers the multipole models with the Auto classes, "multipole" and "multipole_linear" as attention
implementations, and what checkpoints of converted models need to load.
"""

from .commands.startup import begin

begin()  # before torch is imported, which takes seconds

# ruff: noqa: E402
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .integration.conversion import convert, extend_context, revert
from .integration.measurement import token_masses
from .modeling.configuration_multipole import MultipoleConfig
from .modeling.modeling_multipole import (
    MultipoleForCausalLM,
    MultipoleForMaskedLM,
    MultipoleForSequenceClassification,
    MultipoleForTokenClassification,
    MultipoleModel,
)
from .modeling.multipole_attention import multipole_attention
from .modeling.multipole_cache import MultipoleCache
from .modeling.tensor_attention import tensor_attention

__version__ = "0.1.0"

AutoConfig.register("multipole", MultipoleConfig, exist_ok=True)
for auto_class, model_class in (
    (AutoModel, MultipoleModel),
    (AutoModelForCausalLM, MultipoleForCausalLM),
    (AutoModelForMaskedLM, MultipoleForMaskedLM),
    (AutoModelForSequenceClassification, MultipoleForSequenceClassification),
    (AutoModelForTokenClassification, MultipoleForTokenClassification),
):
    auto_class.register(MultipoleConfig, model_class, exist_ok=True)
del auto_class, model_class

__all__ = [
    "MultipoleCache",
    "MultipoleConfig",
    "MultipoleForCausalLM",
    "MultipoleForMaskedLM",
    "MultipoleForSequenceClassification",
    "MultipoleForTokenClassification",
    "MultipoleModel",
    "convert",
    "extend_context",
    "multipole_attention",
    "revert",
    "tensor_attention",
    "token_masses",
]

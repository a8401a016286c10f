"""What the server of processes imports before it starts the first one: libraries and the package, which take seconds."""

from contextlib import suppress

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import hf_multipole.training.run  # noqa: F401

with suppress(ImportError):
    import matplotlib.pyplot  # noqa: F401

torch.set_num_threads(1)

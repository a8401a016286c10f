"""Tiny random models of Transformers' own architectures, for the tests of attn_implementation="multipole" and of conversion."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
)

BLOCK, RANK, N = 8, 2, 75
SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, pad_token_id=0)
GROUPED = SIZES | dict(num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
OPTIONS = {"multipole": {"block_size": BLOCK, "rank": RANK}}
CLOSE = {"atol": 1e-11, "rtol": 1e-9}

DECODERS = {
    "llama": LlamaConfig(**GROUPED, **OPTIONS),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8, **OPTIONS),
    "mistral": MistralConfig(**GROUPED, sliding_window=None, **OPTIONS),
    "phi3": Phi3Config(**GROUPED, **OPTIONS),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, **OPTIONS),
    # Every other layer has a window, and all logits are soft-capped.
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=16, attn_logit_softcapping=3.0, **OPTIONS),
    "qwen3 with windows": Qwen3Config(**GROUPED, head_dim=8, use_sliding_window=True, sliding_window=20, max_window_layers=1, **OPTIONS),
    "gpt_neox": GPTNeoXConfig(**SIZES, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, **OPTIONS),
    "qwen2": Qwen2Config(**GROUPED, **OPTIONS),
    "olmo2": Olmo2Config(**GROUPED, **OPTIONS),
    "smollm3": SmolLM3Config(**GROUPED, **OPTIONS),
    # One layer in two has a window here.
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=16, sliding_window_pattern=2, **OPTIONS),
}
ENCODERS = {
    "bert": BertConfig(**SIZES, max_position_embeddings=256, **OPTIONS),
    # Positions start after that of the padding token.
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=256, **OPTIONS),
    "distilbert": DistilBertConfig(vocab_size=50, dim=32, hidden_dim=32, n_layers=2, n_heads=4, max_position_embeddings=256, **OPTIONS),
    # The first layer of these is global, the second has a window.
    "modernbert": ModernBertConfig(**SIZES, local_attention=20, global_attn_every_n_layers=2, **OPTIONS),
}
# 64 patches and a class token; its model passes no mask.
IMAGES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, patch_size=4, image_size=32)


def auto_class_of(name):
    return AutoModelForCausalLM if name in DECODERS else AutoModelForMaskedLM


def build(config, auto_class=AutoModelForCausalLM, implementation="multipole"):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    # Built by its class: through the Auto class it takes half a second longer.
    model = auto_class._model_mapping[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().eval()


def tokens(rows=2, n=N):
    return torch.randint(3, 50, (rows, n), generator=torch.Generator().manual_seed(1))

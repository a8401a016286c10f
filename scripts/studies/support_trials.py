"""Which architectures of the installed Transformers run with attn_implementation="multipole": each is built small and tried."""

import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import model_type_to_module_name

from hf_multipole.integration.conversion import ATTENTION_CLASSES, attention_modules, convert
from hf_multipole.modeling.attention_masks import WindowMask
from hf_multipole.modeling.multipole_cache import MultipoleCache, MultipoleLayer

BLOCK, TOKENS, VOCABULARY = 8, 75, 64
LARGEST = 2_000_000  # parameters: a configuration that stayed larger has sizes that are not known here
# What says how large a model is, where SIZES does not know the name.
_A_SIZE = re.compile("(size|dim|dims|width|channels|hidden|heads|layers|experts|depth|depths)$")
# Sizes of a small model, under all the names that configurations have for them.
_SIZES = {
    32: "hidden_size d_model n_embd dim hidden_dim d_ff ffn_dim intermediate_size embedding_size embed_dim word_embed_proj_dim n_inner "
    "encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim pooler_hidden_size shared_intermediate_size projection_dim "
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp bottleneck_size "
    "hidden_size_per_layer_input block_ff_dim conv_dim rnn_width lru_width attention_dim",
    16: "q_lora_rank kv_lora_rank",
    8: "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim qk_head_dim global_head_dim attention_head_dim kv_channels "
    "index_head_dim rotary_dim mamba_d_state mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads patch_size linear_num_value_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts",
    2: "num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num num_hidden_layers n_layer n_layers num_layers encoder_layers "
    "decoder_layers num_decoder_layers num_experts_per_tok moe_top_k moe_topk top_k_experts linear_num_key_heads max_window_layers "
    "num_hidden_groups num_dense_layers global_attn_every_n_layers sliding_window_pattern",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace moe_num_shared_experts",
    TOKENS * 4: "max_position_embeddings n_positions max_target_positions n_ctx max_seq_len seq_length max_sequence_length",
    20: "sliding_window local_attention attention_window_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input entity_vocab_size",
}
ONLY_WINDOWS = "none of its layers came to the attention function without a window"
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()} | {"image_size": 32}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def small_config(config_class: type[PreTrainedConfig], **options) -> PreTrainedConfig:
    """A configuration of a small model; raises what the class does where its sizes do not fit each other."""
    default = config_class()
    given = {name: size for name, size in SIZES.items() if isinstance(getattr(default, name, None), int) and name in default.to_dict()}
    given |= {name: x for name, x in IDS.items() if hasattr(default, name)}
    layers = given.get("num_hidden_layers", 2)
    kinds = getattr(default, "layer_types", None)
    if kinds:
        # One of each kind.
        given["layer_types"] = (sorted(set(kinds), key=kinds.index) * layers)[: max(layers, len(set(kinds)))]
        given["num_hidden_layers"] = len(given["layer_types"])
    mlps = getattr(default, "mlp_layer_types", None)
    if mlps:
        given["mlp_layer_types"] = mlps[-1:] * given.get("num_hidden_layers", layers)
    return config_class(**given | options)


def small_model(model_type: str, **options) -> PreTrainedModel:
    """A small random model with attn_implementation="multipole"; raises what the architecture does where none can be made. options: of
    its configuration.
    """
    config_class = CONFIG_MAPPING[model_type]
    if config_class.sub_configs:
        raise NotTried("made of several models, which have rows of their own")
    heads = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
    auto_class = next((head for head in heads if config_class in head._model_mapping), None)
    if auto_class is None:
        raise NotTried("no Auto class builds it")
    if not _uses_interface(model_type):
        raise ValueError("does not compute attention by the attention interface")
    config = small_config(config_class)
    sizes = {name: x for name, x in config.to_dict().items() if isinstance(x, int) and _A_SIZE.search(name)}
    large = [name for name, x in sizes.items() if x > (16 if re.search("(heads|layers|experts|depths?)$", name) else 256)]
    if large:
        raise NotTried(f"the script does not know its sizes: {large[0]}")
    with torch.device("meta"):
        model = auto_class.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise NotTried("the script does not know its sizes")
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise NotTried(f"its input is {model.main_input_name}, neither text nor images")
    if not attention_modules(model):
        raise ValueError("does not compute attention by the attention interface")
    config = small_config(config_class, **options)
    config.multipole = {"block_size": BLOCK, "rank": 2}
    torch.manual_seed(0)
    model = auto_class.from_config(config, attn_implementation="multipole").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _uses_interface(model_type: str) -> bool:
    """Whether the files of an architecture name the attention interface at all; to import them takes much longer."""
    folder = Path(transformers.models.__file__).parent / model_type_to_module_name(model_type)
    return any("ALL_ATTENTION_FUNCTIONS" in path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))


class NotTried(Exception):
    """The reason why an architecture was not tried."""


@contextmanager
def _recorded_calls():
    """The list of "multipole" or "window" for each call of the attention function, and whether any was causal."""
    function, calls = AttentionInterface._global_mapping["multipole"], []

    def record(module, query, key, value, attention_mask=None, **kwargs):
        causal = getattr(attention_mask, "causal", getattr(module, "is_causal", True))
        calls.append(("window" if isinstance(attention_mask, WindowMask) else "multipole", causal))
        return function(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface._global_mapping["multipole"] = record
    try:
        yield calls
    finally:
        AttentionInterface._global_mapping["multipole"] = function


def _output(model, **inputs) -> torch.Tensor:
    out = model(**inputs)
    return out["logits"] if "logits" in out else out["last_hidden_state"]


def _influence(model, token: int, **inputs) -> torch.Tensor:
    """Whether each token of the first row has influence on the output at ``token``, ``(n,)`` bool."""
    kept = []

    def keep(module, args, out):
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        _output(model, **inputs)[0, token].square().sum().backward()
    finally:
        handle.remove()
    model.zero_grad()
    return kept[0].grad[0].abs().sum(-1) > 0


def try_architecture(model_type: str) -> dict:
    """Everything that is said of an architecture in the table: ``status`` ("runs", "refused", "wrong", "not tried"), and what was
    found.
    """
    try:
        try:
            return {"status": "runs"} | _try_windows(model_type)
        except RuntimeError as error:
            # Grouped products of experts, which have no float64.
            if "Double" not in str(error):
                raise
            return {"status": "runs"} | _try(model_type, torch.float32)
    except NotTried as reason:
        return {"status": "not tried", "reason": str(reason)}
    except AssertionError as error:
        return {"status": "wrong", "reason": str(error)}
    except Exception as error:  # whatever an architecture raises is what the table says of it
        return {"status": "refused" if isinstance(error, ValueError) else "fails", "reason": _one_line(error)}


def _one_line(error: Exception) -> str:
    """The first line of an error, without folders of this machine."""
    return re.sub(r"/\S*/site-packages/", "", str(error).strip().split("\n")[0])[:200]


def _try_windows(model_type: str) -> dict:
    """As it is, and without the sliding window that all of its layers have by default."""
    try:
        return _try(model_type, torch.float64)
    except ValueError as error:
        if str(error) != ONLY_WINDOWS or not hasattr(CONFIG_MAPPING[model_type](), "sliding_window"):
            raise
        return _try(model_type, torch.float64, sliding_window=None) | {"with": "sliding_window=None"}


def _try(model_type: str, dtype: torch.dtype, **options) -> dict:
    try:
        model = small_model(model_type, **options).to(dtype)
    except (NotTried, ValueError) as error:
        if isinstance(error, NotTried) or "interface" in str(error):
            raise
        raise NotTried(f"no small model could be made: {_one_line(error)}") from None
    except Exception as error:
        raise NotTried(f"no small model could be made: {type(error).__name__}: {_one_line(error)}") from None
    found = {"class": type(model).__name__, "attention": sorted({type(module).__name__ for module in attention_modules(model).values()})}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(1, model.config.num_channels, 32, 32, dtype=dtype)}
        with _recorded_calls() as calls:
            _output(model, **inputs)
        causal = False
    else:
        ids = torch.randint(3, VOCABULARY, (1, TOKENS))
        inputs = {"input_ids": ids}
        with _recorded_calls() as calls:
            _output(model, **inputs)
        causal = any(causal for _, causal in calls)
        _check_rows(model, ids, causal)
        if causal and model.can_generate():
            found["state"] = _check_state(model, ids)
    found |= {
        "multipole layers": sum(kind == "multipole" for kind, _ in calls),
        "window layers": sum(kind == "window" for kind, _ in calls),
    }
    if not found["multipole layers"]:
        raise ValueError(ONLY_WINDOWS)
    found["causal"] = causal
    if set(found["attention"]) <= set(ATTENTION_CLASSES):
        found["convert"] = _check_conversion(model, inputs)
    return found


def _check_rows(model, ids, causal) -> None:
    """Exact on short rows; the past has influence, the future and padding have none."""
    short = {"input_ids": ids[:, : 2 * BLOCK]}
    out = _output(model, **short)
    model.set_attn_implementation("eager")
    exact = _output(model, **short)
    model.set_attn_implementation("multipole")
    # Eager attention takes its softmax in float32.
    assert (out - exact).abs().max() <= 1e-4 * max(1, exact.abs().max().item()), "short rows are not those of eager attention"

    reached = _influence(model, 50, input_ids=ids)
    assert reached[50], "a token has no influence on itself"
    assert not causal or not reached[51:].any(), "the future has influence"
    for side in ("right", "left"):
        padded = torch.nn.functional.pad(ids, (0, 9) if side == "right" else (9, 0), value=5)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 9) if side == "right" else (9, 0))
        for implementation in ("eager", "multipole"):
            model.set_attn_implementation(implementation)
            reached = _influence(model, 50, input_ids=padded, attention_mask=mask)
            if implementation == "eager" and reached[mask[0] == 0].any():
                # Not by attention: neighbouring embeddings are mixed, say.
                model.set_attn_implementation("multipole")
                break
            assert implementation == "eager" or not reached[mask[0] == 0].any(), f"padding on the {side} has influence"


@torch.no_grad()
def _check_state(model, ids) -> str:
    cache = MultipoleCache(config=model.config)
    if not any(isinstance(layer, MultipoleLayer) for layer in cache.layers):
        return "no"
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        written = model.generate(ids[:, :40], past_key_values=cache, **options)
    except Exception as error:
        return f"no: {error}".split("\n")[0][:120]
    assert torch.equal(written, model.generate(ids[:, :40], **options)), "generation on a state is not that with all keys"
    return "yes"


@torch.no_grad()
def _check_conversion(model, inputs) -> str:
    first = _output(model, **inputs)
    convert(model)
    assert torch.equal(_output(model, **inputs), first), "conversion changes the first output"
    learned = [parameter for name, parameter in model.named_parameters() if ".far_field." in name]
    for parameter in learned:
        parameter.add_(torch.randn_like(parameter) * 0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert learned and same and list(model.state_dict()) == list(loaded.state_dict()), "a converted model does not come back"
    return "yes"

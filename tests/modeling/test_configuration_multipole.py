"""MultipoleConfig: defaults that fit each other, round trips, and one clear error for each field that does not fit."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_multipole import MultipoleConfig, MultipoleModel
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.options import TensorOptions

EVERY_FIELD = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    hidden_act="gelu",
    max_position_embeddings=512,
    initializer_range=0.01,
    rms_norm_eps=1e-5,
    use_cache=False,
    tie_word_embeddings=False,
    attention_bias=True,
    attention_dropout=0.1,
    classifier_dropout=0.2,
    is_causal=False,
    layer_types=["full_attention", "multipole_attention", "tensor_attention"],
    block_size=16,
    rank=2,
    summary="direct",
    size_weighting=False,
    far_bias_init=-3,
    rotate_summaries=True,
    tensor_order=4,
    tensor_window=[3, None, 20],
    tensor_entry_bound=1.5,
    tensor_score_dim=5,
    pad_token_id=4,
    bos_token_id=5,
    eos_token_id=[6, 7],
)


def test_defaults():
    config = MultipoleConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
    assert config.layer_types == ["multipole_attention"] * 2
    assert config.num_key_value_heads == 4 and config.head_dim == 24
    assert config.intermediate_size == 256  # 8 / 3 * 96
    assert config.rope_parameters["rope_type"] == "default" and config.rope_parameters["rope_theta"] > 0
    assert config.is_causal and (config.summary, config.saliency, config.sink_tokens) == ("hierarchical", True, 0)


def test_round_trip(tmp_path):
    config = MultipoleConfig(**EVERY_FIELD)
    for name, value in EVERY_FIELD.items():
        assert getattr(config, name) == value, name
    config.save_pretrained(tmp_path)
    for loaded in (
        MultipoleConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        MultipoleConfig(**config.to_dict()),
        MultipoleConfig.from_dict(json.loads(config.to_json_string(use_diff=True))),
    ):
        assert type(loaded) is MultipoleConfig
        differences = {k for k, v in loaded.to_dict().items() if v != config.to_dict().get(k)}
        # The last is that of the folder.
        assert differences <= {"transformers_version", "_name_or_path", "auto_map"}
    assert AutoConfig.from_pretrained(tmp_path, is_causal=True, rank=4).rank == 4
    # What is not a field, and what other layers may need, survives as well.
    extended = MultipoleConfig(id2label={0: "a", 1: "b", 2: "c"}, problem_type="regression")
    extended.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 3


def test_every_field_reaches_the_model():
    model = MultipoleModel(MultipoleConfig(**EVERY_FIELD))
    full, multipole, tensor = (layer.self_attn for layer in model.layers)
    assert multipole.q_proj.weight.shape == (60, 48) and multipole.k_proj.weight.shape == (20, 48)
    assert multipole.q_proj.bias is not None and multipole.o_proj.weight.shape == (48, 60)
    assert not hasattr(full, "far_field")
    assert multipole.far_field.far_bias.shape == (6, level_count(512, 16)) and (multipole.far_field.far_bias == -3).all()
    assert [weight.shape for weight in multipole.far_field.value_summary.levels][1] == (2, 2, 32, 10)
    assert tensor.q_proj.weight.shape == (30, 48) and tensor.k_proj.weight.shape == (30, 48) and tensor.v_proj.weight.shape == (60, 48)
    assert tensor.k_norm.weight.shape == (6, 1, 5) and tensor.q_norm.bound == 1.5 and tensor.k_proj.bias is not None
    assert tensor.options == TensorOptions(4, window=(3, None, 20), entry_bound=1.5, score_dim=5)
    assert model.layers[0].mlp.gate_proj.weight.shape == (80, 48) and model.norm.eps == 1e-5


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_rope_scaling(tmp_path, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 5000.0, "factor": 2.0}
    config = MultipoleConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=9, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters["rope_type"] == rope_type and loaded.rope_parameters["rope_theta"] == 5000.0
    assert MultipoleModel(loaded).rotary_emb.inv_freq.shape == (8,)


def test_output_attentions_does_not_choose_eager():
    assert MultipoleConfig(output_attentions=True)._attn_implementation is None
    config = MultipoleConfig(attn_implementation="multipole")
    config.output_attentions = True
    assert config._attn_implementation == "multipole" and config.output_attentions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["multipole_attention", "sliding_attention"]}, "layer_types has 'sliding_attention', but the kinds are"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 2"),
        ({"rank": 3}, "rank 3 does not divide block_size 64"),
        ({"rank": 0}, "rank is 0, but must be a positive integer"),
        ({"block_size": -8}, "block_size is -8, but must be a positive integer"),
        ({"summary": "median"}, "summary is 'median', but must be one of 'hierarchical', 'direct', 'mean'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"hidden_size": 65, "num_attention_heads": 2}, "num_attention_heads 2 does not divide hidden_size 65"),
        ({"head_dim": 7}, "head_dim is 7, but rotary positions need an even one"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, but must be positive"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, but must be positive"),
        ({"vocab_size": -1}, "vocab_size is -1, but must be positive"),
        ({"block_size": "64"}, "block_size.*expected int"),
        ({"size_weighting": "yes"}, "size_weighting.*expected bool"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        MultipoleConfig(**{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2} | fields)
    # huggingface_hub wraps the errors of a strict dataclass; what it wraps is what one would catch elsewhere.
    wrapped = caught.value.__cause__ or caught.value
    assert isinstance(wrapped, (ValueError, TypeError))


def test_a_stored_configuration_is_checked_too(tmp_path):
    MultipoleConfig(**EVERY_FIELD).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"rank": 5}))
    with pytest.raises(Exception, match="rank 5 does not divide block_size 16"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_base_class_reads_it(tmp_path):
    """As Trainer does when it goes on from a checkpoint."""
    from transformers import PreTrainedConfig

    config = MultipoleConfig(layer_types=["multipole_attention", "full_attention"], num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path).layer_types == config.layer_types
    with pytest.raises(StrictDataclassError, match="validate_layer_type"):
        PreTrainedConfig(layer_types=["multipol_attention"], num_hidden_layers=1)

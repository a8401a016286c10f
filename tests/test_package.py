"""The package as a whole: what an import does, and checkpoints that run without the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import check_imports

import hf_multipole
from hf_multipole import MultipoleConfig, MultipoleForCausalLM
from hf_multipole.modeling.configuration_multipole import AUTO_MAP
from hf_multipole.training.parsing import parse

ROOT = Path(__file__).parent.parent
MODELING = Path(hf_multipole.__file__).parent / "modeling"
FILES = sorted(path for path in MODELING.glob("*.py") if path.name != "__init__.py")


def run(script: str, *arguments, cwd) -> str:
    """What a fresh interpreter prints, without network, in another folder; the package is on its path."""
    environment = os.environ | {"PYTHONPATH": str(Path(hf_multipole.__file__).parents[1])}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd), "HF_MODULES_CACHE": str(cwd / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# What an import does


def test_mathematics_runs_without_transformers(tmp_path):
    script = """
import importlib, importlib.util, sys
sys.modules["transformers"] = sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location("flat", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["flat"] = importlib.util.module_from_spec(spec)
import torch
for name in sys.argv[2:]:
    importlib.import_module("flat." + name)
q = torch.randn(1, 2, 50, 4)
print(tuple(sys.modules["flat.multipole_attention"].multipole_attention(q, q, q, block_size=8, rank=2).shape))
"""
    interface = re.compile(r"^(from|import) (transformers|safetensors)|^from .triton_common", re.MULTILINE)
    names = [path.stem for path in FILES if not interface.search(path.read_text()) and path.stem != "triton_common"]
    assert len(names) > 10
    assert run(script, MODELING, *names, cwd=tmp_path).strip() == "(1, 2, 50, 4)"


def test_an_import_leaves_stock_models_alone(tmp_path):
    """The same classes, outputs and attention before and after; and nothing that training or kernels need is loaded."""
    script = """
import sys
for name in ("triton", "datasets", "evaluate", "matplotlib"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

def state():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
                         bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    logits = model(torch.arange(40)[None]).logits
    types = {name: (id(type(module)), id(type(module).forward)) for name, module in model.named_modules()}
    return logits, (types, model.config._attn_implementation, list(model.state_dict()), torch.get_num_threads(), torch.get_default_dtype())

def registries():
    return {kind: dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)}

registered, (logits, before) = registries(), state()
import hf_multipole
logits_after, after = state()
assert torch.equal(logits, logits_after) and before == after
for kind, mapping in registries().items():
    assert set(mapping) - set(registered[kind]) == {"multipole", "multipole_linear", "tensor"}
    assert all(mapping[name] is function for name, function in registered[kind].items())
print("untouched")
"""
    assert run(script, cwd=tmp_path).strip() == "untouched"


def test_public_names():
    for name in hf_multipole.__all__:
        assert getattr(hf_multipole, name).__doc__, name


# Checkpoints with their code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with code, some tokens, and the logits that they should give."""
    folder = tmp_path_factory.mktemp("remote") / "tiny_multipole"
    torch.manual_seed(0)
    config = MultipoleConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        layer_types=["multipole_attention", "tensor_attention", "full_attention"],
        block_size=8,
        rank=2,
        tensor_window=[4, 16],
        max_position_embeddings=128,
    )
    model = MultipoleForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    ids = torch.randint(50, (2, 75))
    torch.save((ids, model(ids).logits.detach(), model(ids, output_hidden_states=True).hidden_states[-1].detach()), folder / "expected.pt")
    return folder


def test_what_travels(checkpoint):
    """All relative imports, flat, and every one of them with what it needs."""
    travelled = {path.name for path in checkpoint.glob("*.py")}
    assert {"modeling_multipole.py", "configuration_multipole.py", "attention_functions.py", "multipole_attention.py"} <= travelled
    assert {path.name for path in MODELING.glob("*_triton.py")} <= travelled
    for path in checkpoint.glob("*.py"):
        assert path.read_text() == (MODELING / path.name).read_text()
        # Transformers' own check: raises where a library is missing.
        assert {f"{name}.py" for name in check_imports(path)} <= travelled
    auto_map = AutoConfig.from_pretrained(checkpoint).auto_map
    assert auto_map == AUTO_MAP
    for name in auto_map.values():
        module, cls = name.split(".")
        assert hasattr(sys.modules[f"hf_multipole.modeling.{module}"], cls)


def test_saving_leaves_the_model_alone(tmp_path):
    """The map is that of the folder, and one that was there stays; the configuration by itself has the code, too."""
    model = MultipoleForCausalLM(MultipoleConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(tmp_path / "model")
    assert not hasattr(model.config, "auto_map")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.auto_map = {"AutoConfig": "somewhere--configuration_multipole.MultipoleConfig"}
    config.save_pretrained(tmp_path / "config")
    assert set(config.auto_map) == {"AutoConfig"} and AutoConfig.from_pretrained(tmp_path / "config").auto_map == AUTO_MAP
    assert {path.name for path in (tmp_path / "config").glob("*.py")} == {path.name for path in (tmp_path / "model").glob("*.py")}


def test_transformers_own_way_of_saving_code(tmp_path):
    """``register_for_auto_class`` works as on any custom model."""
    script = """
import sys
from hf_multipole import MultipoleConfig, MultipoleForCausalLM
MultipoleConfig.register_for_auto_class()
MultipoleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
config = MultipoleConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
MultipoleForCausalLM(config).save_pretrained(sys.argv[1])
"""
    folder = tmp_path / "saved"
    run(script, folder, cwd=tmp_path)
    reference = tmp_path / "reference"
    MultipoleConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(reference)
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in reference.glob("*.py")}
    assert AutoConfig.from_pretrained(folder).auto_map == AUTO_MAP


COMMON = """
import sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, logging
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
logging.set_verbosity_error()
folder = sys.argv[1]
ids, logits, hidden = torch.load(folder + "/expected.pt")

def check(model):
    torch.testing.assert_close(model.eval()(ids).logits, logits)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.far_field.key_summary.tokens.grad.abs().max() > 0
    out = model.generate(ids[:, :30], max_new_tokens=20, do_sample=False)
    torch.testing.assert_close(out[:, 30:], model(out).logits[:, 29:-1].argmax(-1))
"""

ALONE = """
sys.modules["hf_multipole"] = None  # an import of it fails
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model.__module__.startswith("transformers_modules."), model.__module__
assert model.config._attn_implementation == "multipole"
check(model)
torch.testing.assert_close(AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state, hidden)
for auto_class in (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
    other = auto_class.from_pretrained(folder, trust_remote_code=True, is_causal=False, pad_token_id=0)
    assert other(ids).logits.isfinite().all()
    assert torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)

# What was loaded with its code is saved with it; its code is then a second copy in this process.
model.save_pretrained(folder + "/again")
check(AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True))
"""

CHECKPOINT_FIRST = """
remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
check(remote)
from hf_multipole import MultipoleForCausalLM
local = MultipoleForCausalLM.from_pretrained(folder)
assert type(local) is not type(remote)
for model in (local, remote, local):
    check(model)
"""

PACKAGE_FIRST = """
from hf_multipole import MultipoleForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
# The package's own classes win, whatever is asked for...
local = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(local) is MultipoleForCausalLM
check(local)
# ...so that the checkpoint's have to be fetched by hand.
remote = get_class_from_dynamic_module("modeling_multipole.MultipoleForCausalLM", folder).from_pretrained(folder)
assert type(remote) is not MultipoleForCausalLM
for model in (remote, local, remote):
    check(model)
"""


@pytest.mark.parametrize("script", [ALONE, CHECKPOINT_FIRST, PACKAGE_FIRST], ids=["alone", "checkpoint first", "package first"])
def test_checkpoint_code(checkpoint, tmp_path, script):
    run(COMMON + script, checkpoint, cwd=tmp_path)


def test_the_package_loads_it_without_its_code(checkpoint):
    ids, logits, _ = torch.load(checkpoint / "expected.pt")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is MultipoleForCausalLM
    torch.testing.assert_close(model(ids).logits, logits)


def test_the_models_that_the_quickstart_compares():
    """Its configurations are valid, and of the same size."""
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    overrides = ["{}", *re.findall(r"'(\{.*\})'", text)]
    assert len(overrides) == 3
    sizes = []
    for given in overrides:
        arguments, *_ = parse(["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config_overrides", given])
        model = MultipoleForCausalLM(MultipoleConfig(vocab_size=384, max_position_embeddings=4096, **arguments.config_overrides))
        sizes.append(model.num_parameters())
    assert max(sizes) <= 1.1 * min(sizes)

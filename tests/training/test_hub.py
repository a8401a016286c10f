"""Uploads, against a stand-in of the Hub: what travels, where to, and that tokens stay here."""

import json

import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_multipole.training.hub import push
from tests.helpers.hub_stand_in import serve
from tests.helpers.training_runs import arguments, train, write_texts

TOKEN = "hf_secretsecretsecret"
STEPS = ["--max_steps", "4", "--save_steps", "2"]


@pytest.fixture
def hub(monkeypatch):
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        # Set by the runs; put back afterwards.
        monkeypatch.setenv("HF_TOKEN", "none")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_pushed(hub, texts, tmp_path, capfd):
    """To the named repository, private and on its branch; with code, tokenizer and card, and without pickles or the token."""
    where = ["--hub_model_id", "me/run", "--hub_private_repo", "true", "--hub_revision", "trial", "--hub_strategy", "end"]
    train(arguments(texts, tmp_path / "run", *STEPS, "--push_to_hub", "true", "--hub_token", TOKEN, *where))
    assert all(created["visibility"] == "private" for created in hub.created) and hub.created[0]["name"] == "run"
    assert {token for _, path, token in hub.requests if "/me/run" in path or "create" in path} == {TOKEN}
    assert any(path == "/api/models/me/run/branch/trial" for _, path, _ in hub.requests)
    assert list(hub.files) == ["trial"] and hub.messages == ["End of training"]
    pushed = hub.files["trial"]
    wanted = {"model.safetensors", "config.json", "tokenizer_config.json", "README.md", "modeling_multipole.py", "figures.json"}
    assert wanted <= set(pushed)
    assert not [name for name in pushed if name.endswith((".bin", ".pt", ".pth")) or "checkpoint-" in name]
    for name, content in pushed.items():
        (tmp_path / "pulled").mkdir(exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("run", "pulled"))
    assert all(left.equal(right) for left, right in zip(model.state_dict().values(), other.state_dict().values()))
    assert "AutoModelForMaskedLM" in json.loads(pushed["config.json"])["auto_map"]
    assert AutoTokenizer.from_pretrained(tmp_path / "pulled").eos_token_id == 1
    assert "--hub_token '***'" in ModelCard.load(tmp_path / "pulled" / "README.md").text

    captured = capfd.readouterr()
    assert f"{hub.address}/me/run/commit/1" in captured.out
    assert TOKEN not in captured.out + captured.err
    for content in (*files(tmp_path).values(), *pushed.values()):
        assert TOKEN.encode() not in content


def test_every_save_is_pushed(hub, texts, tmp_path):
    train(arguments(texts, tmp_path / "run", *STEPS, "--push_to_hub", "true", f"--hub_token={TOKEN}", "--hub_strategy", "every_save"))
    assert hub.messages == ["Training, step 2", "Training, step 4", "End of training"]
    assert "optimizer.pt" not in hub.files["main"] and hub.created[0]["name"] == "run"
    assert "--hub_token=***" in hub.files["main"]["README.md"].decode().replace("'", "")


def test_a_failed_upload_does_not_lose_the_run(hub, texts, tmp_path, capfd):
    """During training it is a line; at the end it is a line too, that says where the model is."""
    hub.failures["/commit/"] = [403] * 9
    with pytest.raises(SystemExit) as caught:
        train(arguments(texts, tmp_path / "run", *STEPS, "--push_to_hub", "true"))
    assert "the upload to the Hub failed" in str(caught.value.code) and f"the trained model is in {tmp_path / 'run'}" in str(
        caught.value.code
    )
    assert "\n" not in str(caught.value.code)
    assert "the checkpoint of step 2 was not uploaded" in capfd.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.hidden_size == 16


def test_a_refused_token_stops_the_run_before_it_begins(hub, texts, tmp_path):
    hub.failures["/repos/create"] = [401] * 9
    with pytest.raises(SystemExit) as caught:
        train(arguments(texts, tmp_path / "run", *STEPS, "--push_to_hub", "true", "--hub_token", TOKEN))
    assert "401" in str(caught.value.code) and TOKEN not in str(caught.value.code)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "optimizer.pt").write_text("pickle")
    return tmp_path / "model"


def options(folder):
    return TrainingArguments(output_dir=str(folder), hub_model_id="me/run", report_to="none", use_cpu=True)


@pytest.mark.parametrize(
    ("statuses", "retries", "works"), [([503, 500], 2, True), ([500, 500], 1, False), ([429], 1, True), ([403], 5, False)]
)
def test_retries(hub, folder, statuses, retries, works):
    """After a failure of the server, but not after a refusal."""
    hub.failures["/repos/create"] = list(statuses)
    if works:
        assert push(folder, options(folder), "message", retries).endswith("/commit/1")
        assert list(hub.files["main"]) == ["config.json"]
    else:
        with pytest.raises(OSError, match="the upload to the Hub failed"):
            push(folder, options(folder), "message", retries)
        assert "main" not in hub.files


def test_no_network(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    with pytest.raises(OSError, match="the upload to the Hub failed"):
        push(folder, options(folder), "message", retries=1)

"""The repository's own model: small, Gemma-3, and with perplexities that mean something."""

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open

from kvttl.session import demo_model, texts
from kvttl.session.demo_model import (
    DEMO_MODEL,
    cached_snapshot,
    has_weights,
    load_model,
    load_tokenizer,
    model_path,
    prompt_perplexity,
)
from kvttl.session.texts import example_prompts, random_characters

PATH = str(DEMO_MODEL)
OWN_SOURCES = [Path(demo_model.__file__), Path(__file__).parents[1] / "data/train_demo_model.py"]

CODE_PROMPTS = {
    "class": texts.CODE_PROMPT,
    "functions": '''\
import os
import json


def read_settings(path, default=None):
    """Return the settings in the file, or the default if it does not exist."""
    if not os.path.exists(path):
        return default
    with open(path, encoding="utf-8") as f:
        data = json.load(f)
    if not isinstance(data, dict):
        raise TypeError("settings must be a dict, not %r" % type(data).__name__)
    return data


def write_settings(path, data):
    temp = path + ".tmp"
    with open(temp, "w", encoding="utf-8") as f:
        json.dump(data, f, indent=4)
    os.replace(temp, path)
''',
    "test case": """\
import unittest


class StackTest(unittest.TestCase):

    def setUp(self):
        self.stack = Stack()

    def test_push(self):
        self.stack.push(1)
        self.stack.push(2)
        self.assertEqual(len(self.stack), 2)
        self.assertEqual(self.stack.pop(), 2)

    def test_empty(self):
        with self.assertRaises(IndexError):
            self.stack.pop()


if __name__ == "__main__":
    unittest.main()
""",
}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A Hugging Face cache of the test's own, and no KV_MODEL_DIR."""
    monkeypatch.delenv(demo_model.MODEL_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_model(folder: Path, weights: bytes = b"w") -> Path:
    """Write a folder that looks like a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def put_in_cache(cache: Path, hub_id: str, weights: bytes = b"w") -> Path:
    """Write a model as the hub's client lays it out."""
    root = cache / ("models--" + hub_id.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    return put_model(root / "snapshots" / "abc", weights)


# ---- the files -----------------------------------------------------------------------------


def test_model_is_at_most_8_mb():
    size_bytes = sum(p.stat().st_size for p in DEMO_MODEL.rglob("*") if p.is_file())
    assert 1_000_000 < size_bytes <= 8_000_000


def test_architecture_is_gemma3():
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["max_position_embeddings"] >= 2048
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}


def test_every_weight_is_bfloat16_and_finite():
    with safe_open(DEMO_MODEL / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]
    assert sum(t.numel() for t in tensors) > 1_000_000
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert all(torch.isfinite(t).all() for t in tensors)


def test_training_log_shows_learning():
    losses = json.loads((DEMO_MODEL / "training_log.json").read_text())["losses"]
    for part in ("code_held_out", "prose_held_out"):
        assert losses[-1][part] < losses[0][part] < math.log(2048)  # nats; 2048: the vocabulary


# ---- perplexity ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODE_PROMPTS)
def test_code_is_clearly_below_30(name):
    assert prompt_perplexity(CODE_PROMPTS[name], PATH) < 27


def test_code_prompts_are_not_in_the_standard_library():
    middles = [text[len(text) // 3 :][:120] for text in CODE_PROMPTS.values()]
    root = Path(sysconfig.get_paths()["stdlib"])
    library = [
        p.read_text(encoding="utf-8", errors="ignore")
        for p in root.rglob("*.py")
        if "site-packages" not in p.parts
    ]
    assert len(library) > 100
    assert not [m for m in middles if any(m in text for text in library)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_characters", [60, 400, 1500])
def test_random_characters_are_clearly_above_50(n_characters, seed):
    assert prompt_perplexity(random_characters(n_characters, seed), PATH) > 100


def test_example_prompts_are_ordered():
    values = {name: prompt_perplexity(text, PATH) for name, text in example_prompts().items()}
    assert max(values["template"], values["code"]) < values["prose"] < values["noise"]


def test_a_repeated_template_gets_easier():
    line = texts.TEMPLATE_LINE
    assert prompt_perplexity(line * 12, PATH) < prompt_perplexity(line * 3, PATH) / 2


def test_long_code_stays_below_40():
    text = "\n\n".join(path.read_text() for path in OWN_SOURCES)
    ids = load_tokenizer(PATH)(text[:10_000])["input_ids"]
    assert len(ids) > 1800
    assert prompt_perplexity(ids, PATH, max_tokens=1800) < 40


def test_perplexity_is_exp_of_the_mean_loss_token_by_token():
    ids = load_tokenizer(PATH)("return self.name")["input_ids"]
    nats = []
    for n in range(1, len(ids)):
        logits = load_model(PATH)(input_ids=torch.tensor([ids[:n]])).logits[0, -1]
        nats.append(-torch.log_softmax(logits, dim=-1)[ids[n]].item())
    expected = math.exp(sum(nats) / len(nats))
    assert prompt_perplexity(ids, PATH) == pytest.approx(expected, rel=1e-3)
    assert prompt_perplexity("return self.name", PATH) == pytest.approx(expected, rel=1e-3)


def test_max_tokens_cuts_the_prompt():
    ids = load_tokenizer(PATH)(CODE_PROMPTS["functions"])["input_ids"]
    assert prompt_perplexity(ids, PATH, max_tokens=20) == prompt_perplexity(ids[:20], PATH)
    assert prompt_perplexity(ids, PATH, max_tokens=20) != prompt_perplexity(ids, PATH)


@pytest.mark.parametrize("prompt", ["", [], [7]])
def test_too_short_a_prompt_is_a_value_error(prompt):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        prompt_perplexity(prompt, PATH)


# ---- tokenizer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語 и русский", "🙂🚀 𝕏", "a\n\tb  c\r\n", "\x00"]
)
def test_tokenizer_round_trips_unicode(text):
    tokenizer = load_tokenizer(PATH)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and max(ids) < 2048
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_uses_gemma_turns():
    text = load_tokenizer(PATH).apply_chat_template(
        [{"role": "user", "content": " hello "}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"


# ---- choosing the model --------------------------------------------------------------------


def test_own_model_is_the_default(empty_cache):
    assert model_path() == PATH and Path(PATH).is_absolute()


def test_cached_gemma_comes_before_the_own_model(empty_cache):
    folder = put_in_cache(empty_cache, demo_model.GEMMA_ID)
    assert model_path() == str(folder)


def test_cached_gemma_with_empty_weights_is_passed_over(empty_cache):
    put_in_cache(empty_cache, demo_model.GEMMA_ID, weights=b"")
    assert model_path() == PATH


def test_cached_gemma_with_a_deleted_blob_is_passed_over(empty_cache):
    folder = put_in_cache(empty_cache, demo_model.GEMMA_ID)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("deleted_blob")
    assert model_path() == PATH


def test_prefer_and_environment_win(empty_cache, tmp_path, monkeypatch):
    put_in_cache(empty_cache, demo_model.GEMMA_ID)
    named, other = put_model(tmp_path / "named"), put_model(tmp_path / "other")
    monkeypatch.setenv(demo_model.MODEL_DIR_VARIABLE, str(other))
    assert model_path() == str(other)
    assert model_path(str(named)) == str(named)


def test_prefer_takes_a_cached_hub_id(empty_cache):
    folder = put_in_cache(empty_cache, "someone/model")
    assert model_path("someone/model") == str(folder)
    assert cached_snapshot("someone/model", cache_dir=str(empty_cache)) == folder


@pytest.mark.parametrize("name", ["someone/absent-model", "/no/such/folder", "a b", "../.."])
def test_absent_model_is_a_value_error_that_names_it(empty_cache, name):
    with pytest.raises(ValueError) as caught:
        model_path(name)
    assert repr(name) in str(caught.value) and "config.json" in str(caught.value)


def test_absent_model_in_the_environment_is_a_value_error(empty_cache, monkeypatch):
    monkeypatch.setenv(demo_model.MODEL_DIR_VARIABLE, "no_such_folder")
    with pytest.raises(ValueError, match="no_such_folder"):
        model_path()


def test_folder_without_weights_is_no_model(tmp_path):
    assert has_weights(put_model(tmp_path / "whole"))
    assert not has_weights(put_model(tmp_path / "empty_weights", b""))
    (tmp_path / "whole" / "config.json").unlink()
    assert not has_weights(tmp_path / "whole")


def test_every_file_of_split_weights_must_be_there(tmp_path):
    folder = put_model(tmp_path / "split")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not has_weights(folder)
    (folder / "model-2.safetensors").write_bytes(b"w")
    assert has_weights(folder)


# ---- examples ------------------------------------------------------------------------------


def test_examples_depend_on_the_seed_alone():
    assert example_prompts(0) == example_prompts(0)
    assert example_prompts(0)["noise"] != example_prompts(1)["noise"]

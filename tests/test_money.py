"""Tariffs, bills of replays, and how large a model's KV cache is."""

import importlib
import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING
from waiting import wait_until

from kvttl import data_folder
from kvttl.lmcache.kv_size import KV_BITS, kv_bytes_per_token
from kvttl.replay.command import main
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.money.bills import (
    bill,
    break_even,
    hindsight,
    leader,
    learned,
    money_table,
)
from kvttl.replay.money.tariffs import Tariff, load_tariffs, on_hardware
from kvttl.replay.policies import Plan
from kvttl.replay.runs import index_runs
from kvttl.session.demo_model import DEMO_MODEL
from kvttl.storage.checksum import CHECKSUM_BYTES
from kvttl.traces.builder import make_trace
from kvttl.traces.generator import agent_loops

DATED = {"source": "a page", "read_on": date(2026, 6, 17)}
MENU = Tariff(**DATED, input_per_mtok=3.0, read=0.1, writes={300: 1.25, 3600: 2.0})
RENT = Tariff(**DATED, input_per_mtok=1.25, read=0.1, storage_per_mtok_hour=4.5)
GPU = {"gpu_per_hour": 3.6, "prefill_tokens_per_s": 1e4, "load_bytes_per_s": 1e9}
GPU |= {"bytes_per_token": 2.0**15, "price_per_gib_hour": 0.01}


# --- bills ----------------------------------------------------------------------------------


def test_a_bill_by_hand():
    """1,000 tokens twice, 60 s apart, and again after 400 s: written, hit, written again."""
    trace = make_trace([range(10)] * 3, [0, 60, 460], block_tokens=100)
    table = money_table(trace, {"menu": MENU, "rent": RENT}).set_index(["tariff", "policy"])
    assert table.total["menu", "no cache"] == pytest.approx(3000 * 3e-6)
    assert table.total["menu", "5 min"] == pytest.approx((2000 * 1.25 + 1000 * 0.1) * 3e-6)
    assert table.total["menu", "1 h"] == pytest.approx((1000 * 2 + 2000 * 0.1) * 3e-6)
    stored = 1000 * 360 / 3600 * 4.5e-6  # 60 s, and 300 until it ends
    assert table.storage["rent", "5 min"] == pytest.approx(stored)
    assert table.total["rent", "5 min"] == pytest.approx(2100 * 1.25e-6 + stored)
    assert table.per_mtok["menu", "no cache"] == pytest.approx(3.0)
    assert table.mean_gib_held["rent", "1 h"] == pytest.approx(1000 * 131_072 / 2**30)
    assert ("menu", "24 h") not in table.index and ("rent", "24 h") in table.index


def test_short_prompts_are_neither_written_nor_read():
    trace = make_trace([range(10)] * 2, [0, 60], block_tokens=100)
    short = Tariff(**DATED, input_per_mtok=3.0, read=0.1, writes={300: 1.25}, least_tokens=1024)
    table = money_table(trace, {"menu": short})
    assert table.total.tolist() == pytest.approx([2000 * 3e-6] * 3)


def test_attention_makes_long_prompts_dearer_and_their_ends_dearest():
    tariff = on_hardware(**DATED, **GPU, attention_tokens=1000)
    whole, half = tariff.computing([2000, 1000])
    assert whole == pytest.approx(2000 * (1 + 1) * 3.6 / 3600 / 1e4)
    result = replay(make_trace([range(10), range(20)], [0, 1], block_tokens=100), "infinite")
    assert bill(result, tariff)["computing"] == pytest.approx(whole)
    assert whole - half == pytest.approx(half * 5 / 3)


def test_hardware_is_priced_by_time_and_room():
    tariff = on_hardware(**DATED, **GPU)
    assert tariff.input_per_mtok == pytest.approx(3.6 / 3600 / 1e4 * 1e6)
    assert tariff.read == pytest.approx(2.0**15 / 1e9 * 1e4)
    assert tariff.storage_per_mtok_hour == pytest.approx(2.0**15 / 2**30 * 0.01 * 1e6)
    assert on_hardware(**DATED, **GPU | {"load_bytes_per_s": 1.0}).read == 1.0


def test_an_empty_trace_costs_nothing():
    table = money_table(make_trace([]), {"menu": MENU, "rent": RENT})
    assert (table.total == 0).all()


# --- how long -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1_000, 100_000])
@pytest.mark.parametrize("tariff", [RENT, on_hardware(**DATED, **GPU, attention_tokens=30_500)])
def test_at_the_break_even_keeping_costs_what_computing_does(tariff, tokens):
    (row,) = break_even(tariff, [tokens]).to_dict("records")
    for share, keeping_wins in ((0.99, True), (1.01, False)):
        trace = make_trace([[0]] * 2, [0, row["longest_s"] * share], block_tokens=tokens)
        kept = bill(replay(trace, "infinite"), tariff)["total"]
        no_cache = bill(replay(trace, "recency", 0), tariff)["total"]
        assert (kept < no_cache) is keeping_wins
    assert row["ttl"] == "any" and row["uses"] == 0


def test_the_break_even_of_ttls_on_offer():
    table = break_even(MENU, [10_000]).set_index("ttl")
    assert table.uses.to_dict() == pytest.approx({"5 min": 0.25 / 0.9, "1 h": 1 / 0.9})
    # Read every 5 minutes, at .1 each, until that has cost what writing anew does: 1.25 less .1.
    assert table.longest_s["5 min"] == pytest.approx(300 * (1.25 - 0.1) / 0.1)
    free = Tariff(**DATED, input_per_mtok=1.0, read=0.0, least_tokens=1024)
    assert break_even(free, [1_000, 10_000]).longest_s.tolist() == [0.0, np.inf]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_cheaper_than_hindsight(seed):
    index = index_runs(agent_loops(150, seed=seed))
    tariff = on_hardware(**DATED, **GPU, attention_tokens=30_500)
    for terms in (RENT, tariff):
        table = money_table(index, {"it": terms}).set_index("policy").total
        assert table["hindsight"] == pytest.approx(table.min()) and table["hindsight"] > 0
    rng = np.random.default_rng(seed)
    best = bill(replay_without_capacity(index, policy=lambda i, c: hindsight(i, RENT)), RENT)
    for _ in range(20):
        ttl_s = rng.exponential(rng.choice([3, 30, 300]), index.runs)
        plan = Plan(index, "run", ttl_s=ttl_s)
        other = bill(replay_without_capacity(index, policy=lambda i, c, plan=plan: plan), RENT)
        assert best["total"] <= other["total"]


def sessions(gap_s, turns, count, start_s=20.0):
    """Sessions of some turns, each a block longer, so many seconds apart."""
    rows = [
        (start_s * s + gap_s * turn, [1000 * s + block for block in range(4 + turn)])
        for s in range(count)
        for turn in range(turns)
    ]
    rows.sort(key=lambda row: row[0])
    return make_trace([blocks for _, blocks in rows], [at for at, _ in rows], block_tokens=500)


def choice(trace):
    index = index_runs(trace)
    fixed = {s: replay_without_capacity(index, policy=kept_for(s)) for s in MENU.writes}
    return leader(index, MENU, fixed)


def kept_for(ttl_s):
    return lambda index, config: Plan(index, ttl_s=np.full(index.trace.requests, float(ttl_s)))


@pytest.mark.parametrize(
    "gap_s, turns, wanted", [(60.0, 8, 1.25), (1500.0, 8, 2.0), (10.0, 1, 1.0)]
)
def test_the_choice_follows_the_ttl_that_pays(gap_s, turns, wanted):
    """Turns a minute apart want 5 min, half an hour apart 1 h, prompts that never return none."""
    trace = sessions(gap_s, turns, 400)
    _, write = choice(trace)
    late = trace.arrival_s > 0.6 * trace.span_s
    assert set(write[late]) == {wanted} and write[0] == 1.0


def test_a_choice_hits_what_a_walk_over_blocks_says():
    trace = sessions(200.0, 5, 60, 40.0)
    result, write = choice(trace)
    ttl_of = {1.0: 0.0, 1.25: 300.0, 2.0: 3600.0}
    until_s, paid_s = {}, {}
    for request, at_s in enumerate(trace.arrival_s):
        whole, hits = True, 0
        for block in trace.request(request).tolist():
            whole = whole and until_s.get(block, -1.0) >= at_s
            hits += whole
            paid_s[block] = paid_s[block] if whole else ttl_of[write[request]]
            until_s[block] = at_s + paid_s[block]
        assert result.hit_blocks[request].sum() == hits, request
    assert len(set(write)) > 1


def test_what_is_learned_beats_fixed_ttls_where_they_are_all_wrong():
    """Half of the sessions return after 20 s, half never; storage is dear."""
    often, once = sessions(20.0, 8, 200, 30.0), sessions(20.0, 1, 1600, 4.0)
    rows = [(t, [b for b in often.request(r).tolist()]) for r, t in enumerate(often.arrival_s)]
    base = often.unique_blocks
    rows += [(t, [base + b for b in once.request(r)]) for r, t in enumerate(once.arrival_s)]
    rows.sort(key=lambda row: row[0])
    trace = make_trace([b for _, b in rows], [t for t, _ in rows], block_tokens=500)
    table = money_table(trace, {"rent": RENT}).set_index("policy").total
    assert table["learned"] < min(table[name] for name in ("no cache", "5 min", "1 h", "24 h"))
    assert (learned(index_runs(trace), RENT).ttl_s >= 0).all()


# --- tariffs --------------------------------------------------------------------------------


def test_the_tariffs_that_are_shipped_are_dated_and_have_sources():
    tariffs = load_tariffs()
    assert {"anthropic sonnet", "gemini-2.5-pro", "h100 8b, memory"} <= set(tariffs)
    for tariff in tariffs.values():
        assert tariff.source.startswith("https://") and tariff.read_on > date(2026, 1, 1)
    assert load_tariffs(bytes_per_token=1024)["h100 8b, disk"].bytes_per_token == 1024


def test_a_date_may_be_text(tmp_path):
    """So it comes where another library has changed what YAML's readers make of dates."""
    file = tmp_path / "t.yaml"
    file.write_text('a: {source: x, read_on: "2026-06-17", input_per_mtok: 1, read: 0}')
    assert load_tariffs(file)["a"].read_on == date(2026, 6, 17)


GOOD = "source: a page\n  read_on: 2026-06-17\n  "


@pytest.mark.parametrize(
    "text, says",
    [
        ("a: 3", "a: a tariff must be fields by name, got 3"),
        ("- a", "must hold tariffs by name, got"),
        ("", "must hold tariffs by name, got None"),
        (f"a:\n  {GOOD}read: 0.1", "a: input_per_mtok is missing"),
        (f"a:\n  {GOOD}input_per_mtok: 3\n  raed: 1", "unknown field 'raed': did you mean 'read'?"),
        (f"a:\n  {GOOD}input_per_mtok: 3\n  read: 1.1", "read must be 0..1, got 1.1"),
        (f"a:\n  {GOOD}input_per_mtok: 0\n  read: 0", "input_per_mtok must be .*, got 0"),
        (f"a:\n  {GOOD}input_per_mtok: .nan\n  read: 0", "input_per_mtok must be .*, got nan"),
        (f"a:\n  {GOOD}input_per_mtok: 1\n  read: 0\n  writes: 3", "writes must be shares by sec"),
        (f"a:\n  {GOOD}input_per_mtok: 1\n  read: 0\n  writes: {{60: 0.5}}", "writes.60. must be"),
        (f"a:\n  {GOOD}input_per_mtok: 1\n  read: 0\n  writes: {{5m: 1}}", "a TTL of writes must"),
        (
            f"a:\n  {GOOD}input_per_mtok: 1\n  read: 0\n  writes: {{60: 1}}\n  "
            "storage_per_mtok_hour: 1",
            "storage_per_mtok_hour beside writes must be",
        ),
        ("a:\n  source: x\n  read_on: June\n  input_per_mtok: 1\n  read: 0", "read_on a date"),
        (f"a:\n  {GOOD}gpu_per_hour: 2", "prefill_tokens_per_s is missing"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_tariff_is_one_sentence_that_names_it(tmp_path, capsys, text, says):
    path = tmp_path / "tariffs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as raised:
        load_tariffs(path)
    assert str(path) in str(raised.value) or "YAML" in says
    assert main(["--tariff", str(path), "--cache-dir", ""]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("name", GPU)
def test_bad_hardware_is_named(name):
    for bad in (0, -1, float("nan"), "x"):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {bad!r}"):
            on_hardware(**DATED, **GPU | {name: bad})


def test_the_command_bills_a_trace_for_a_model(capsys):
    given = ["--tariff", str(data_folder() / "tariffs.yaml"), "--model", str(DEMO_MODEL)]
    given += ["--capacity", "0.1", "--policy", "recency", "--cache-dir", ""]
    assert main(["--trace", str(data_folder() / "sample_trace.jsonl.gz"), *given]) == 0
    said = capsys.readouterr()
    bills = json.loads(said.out.splitlines()[-1])["bills"]
    assert {row["policy"] for row in bills} > {"no cache", "5 min", "1 h", "24 h", "recency"}
    assert "A million prompt tokens" in said.err and "hindsight" in said.err
    assert main(["--tariff", "no/such.yaml", "--cache-dir", ""]) == 1
    assert "TARIFF must be a YAML file" in capsys.readouterr().err


# --- sizes ----------------------------------------------------------------------------------

MODELS = {  # model type -> what differs from a small decoder
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    "gpt2": {"n_layer": 4, "n_head": 8, "n_embd": 512},
    "falcon": {"num_attention_heads": 8, "multi_query": True, "new_decoder_architecture": False},
    "deepseek_v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 8},
}


def config_of(kind, folder):
    """A config.json as transformers writes it; returns its folder and vLLM's reading of it."""
    importlib.import_module("vllm.config")  # first, or modules import each other in a circle
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    small = {"hidden_size": 512, "num_hidden_layers": 4} if kind != "gpt2" else {}
    config = CONFIG_MAPPING[kind](**small | MODELS[kind])
    config.save_pretrained(folder)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(kind, ModelArchConfigConvertorBase)
    return convertor(config, config)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("kind", MODELS)
def test_sizes_are_lmcaches_for_the_heads_that_vllm_finds(tmp_path, kind, kv_dtype):
    """LMCache's own code gathers a chunk of vLLM's caches: as many bytes as said."""
    from lmcache.v1.multiprocess.transfer_context.base import gather_paged_kv_to_cpu

    vllm, tokens = config_of(kind, tmp_path), 16
    heads, width = vllm.get_total_num_kv_heads(), vllm.get_head_size()
    shape = (2, 8, heads, tokens, width)  # of vLLM's CPU backend
    if vllm.is_deepseek_mla():
        shape = (8, tokens, width)
    dtype = torch.uint8 if kv_dtype == "fp8" else torch.bfloat16
    layers = {str(i): torch.zeros(shape, dtype=dtype) for i in range(vllm.get_num_hidden_layers())}
    (chunk,) = gather_paged_kv_to_cpu(layers, [0], 1)
    assert kv_bytes_per_token(tmp_path, kv_dtype) * tokens == chunk.nbytes


def test_the_published_sizes_of_models_that_people_run():
    """What their own papers and cards say of a token."""
    v3 = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "kv_lora_rank": 512}
    assert kv_bytes_per_token(v3 | {"qk_rope_head_dim": 64}) == 61 * (512 + 64) * 2  # 70 KB
    llama = {"model_type": "llama", "num_hidden_layers": 80, "num_key_value_heads": 8}
    llama |= {"hidden_size": 8192, "num_attention_heads": 64}
    assert kv_bytes_per_token(llama) == 327_680  # Llama-3-70B
    scheme = {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}
    assert kv_bytes_per_token(llama | scheme) == kv_bytes_per_token(llama, "fp8") == 163_840
    assert kv_bytes_per_token({"model_type": "of another kind", "text_config": llama}) == 327_680


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"model_type": "qwen3_next"}, "model must have attention .*linear_"),
        ({"model_type": "mamba"}, "model must have attention .*state_size"),
        ({"model_type": "t5"}, "is_encoder_decoder"),
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "index_topk"),
        ({"model_type": "gemma4_text"}, "model must have attention"),
        ({"model_type": "own"}, "num_hidden_layers of config.json must be a whole number >= 1"),
        ({"model_type": "own", "num_hidden_layers": -3}, "num_hidden_layers .* got -3"),
        ({"num_hidden_layers": 3, "head_dim": 64}, "num_attention_heads .* got None"),
    ],
)
def test_what_cannot_be_counted_is_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        kv_bytes_per_token(bad)


def test_a_bad_dtype_or_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="kv_dtype must be one of auto, .*, got 'int3'"):
        kv_bytes_per_token(DEMO_MODEL, "int3")
    (tmp_path / "config.json").write_text("[1")
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="MODEL must be a config.json or its folder"):
            kv_bytes_per_token(path)
    assert KV_BITS["auto"] == 16


def test_the_demo_models_size_is_that_of_its_stored_chunks(stack, llm, greedy, fresh_text):
    """What the engine stored: a file of the disk tier holds a chunk and this kit's checksum."""
    llm.generate([fresh_text()], greedy)
    folder = Path(stack.config.disk_path)
    chunk = kv_bytes_per_token(DEMO_MODEL) * stack.config.chunk_size_tokens
    stored = chunk + CHECKSUM_BYTES
    assert wait_until(lambda: stored in {path.stat().st_size for path in folder.glob("*.data")})

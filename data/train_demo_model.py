"""Train the repository's own small Gemma-3 model on Python's standard library.

`make demo-model` runs it.  Nothing is downloaded: the text is the standard library of the
interpreter that runs it (code, docstrings and the help topics of ``pydoc``), the tokenizer and
the weights are made here from a seed.
"""

import argparse
import ast
import json
import math
import shutil
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics  # the longest English text that Python installs
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from kvttl import user_path
from kvttl.session.demo_model import MAX_TOKENS, next_token_loss

_PAD, EOS, BOS, _UNK, TURN, END_TURN = range(6)  # first four as in Gemma
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
VOCAB_SIZE = 2048  # small: the embedding has to fit in 8 MB beside the layers
# Encodings are tables, tests are repetitive, and both would outweigh the rest.
SKIPPED_FOLDERS = {"encodings", "site-packages", "dist-packages", "__phello__"}
SKIPPED_FOLDERS |= {"test", "tests", "idle_test", "__pycache__"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
    "{{ '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Phase(NamedTuple):
    """One stretch of training at a fixed sequence length."""

    steps: int
    seq_tokens: int
    batch: int  # sequences per step


# Short sequences are cheap and teach most of the language; the later ones teach distance.
PHASES = (Phase(1300, 256, 16), Phase(350, 512, 8), Phase(150, MAX_TOKENS, 2))


# ---- corpus --------------------------------------------------------------------------------


def stdlib_files(root: Path, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """List the standard library's own text files in a fixed order."""
    found = (path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    return sorted(p for p in found if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def read_text(path: Path) -> str:
    """Read a file as UTF-8, or as "" if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def docstrings(source: str) -> str:
    """Return all docstrings of a module as paragraphs of prose."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def held_out(index: int) -> str:
    """Return the suffix of the part that a text at this place goes to: 2 % are for validation."""
    return "_held_out" if index % 50 == 25 else ""


def load_corpus(root: Path) -> dict[str, list[str]]:
    """Read the standard library under `root`, split by whole files, code and prose."""
    corpus = {name: [] for name in ("code", "prose", "code_held_out", "prose_held_out")}
    for index, path in enumerate(stdlib_files(root)):
        if (text := read_text(path)) and path.parent.name != "pydoc_data":  # below, unescaped
            corpus["code" + held_out(index)].append(text)
            corpus["prose" + held_out(index)].append(docstrings(text))
    others = [read_text(path) for path in stdlib_files(root, (".txt", ".rst"))]
    for index, text in enumerate([topics[name] for name in sorted(topics)] + others):
        corpus["prose" + held_out(index)].append(text)
    return corpus


# ---- tokenizer -----------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can write any Unicode text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    options = {"special_tokens": SPECIAL_TOKENS, "show_progress": False, **alphabet}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, **options))
    begin = {"single": "<bos> $A", "pair": "<bos> $A $B:1", "special_tokens": [("<bos>", BOS)]}
    bpe.post_processor = processors.TemplateProcessing(**begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL_TOKENS)),
        additional_special_tokens=SPECIAL_TOKENS[TURN:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return the texts as one array of token ids, each between <bos> and <eos>."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([[BOS, *ids, EOS] for ids in encoded if ids]).astype(np.int64)


# ---- batches -------------------------------------------------------------------------------


class WindowSampler:
    """Draws training sequences from the code and prose streams with its own generator.

    Parameters
    ----------
    code, prose : np.ndarray
        Token ids, shape (n_tokens,).
    newline : list[int]
        Token ids of a line break, used in chat turns.
    seed : int
    """

    PROSE_SHARE = 0.35  # prose is about a fifth of the text; prompts hold more of it
    NO_BOS_SHARE = 0.25  # so that a prompt without <bos> is not a surprise
    REPEAT_SHARE = 0.10  # a passage over and over: teaches copying, which templates need
    CHAT_SHARE = 0.08  # in Gemma's turn markers

    def __init__(self, code: np.ndarray, prose: np.ndarray, newline: list[int], seed: int):
        self.code, self.prose, self.newline = code, prose, newline
        self.rng = np.random.default_rng(seed)

    def passage(self, n_tokens: int) -> np.ndarray:
        """Return `n_tokens` consecutive ids from a random place."""
        stream = self.prose if self.rng.random() < self.PROSE_SHARE else self.code
        start = self.rng.integers(len(stream) - n_tokens)
        return stream[start : start + n_tokens]

    def repeated(self, n_tokens: int) -> np.ndarray:
        """Return a short passage repeated up to `n_tokens`."""
        period = int(self.rng.integers(8, max(9, n_tokens // 3)))
        return np.resize(self.passage(period), n_tokens)

    def chat(self, n_tokens: int) -> np.ndarray:
        """Return a passage broken into a user's turn and a model's turn."""
        body = self.passage(n_tokens)
        cut = int(self.rng.integers(8, n_tokens // 2))
        turn = [END_TURN, *self.newline, TURN]
        return np.concatenate([[TURN], body[:cut], turn, body[cut:]])[:n_tokens]

    def window(self, n_tokens: int) -> np.ndarray:
        """Return one training sequence of `n_tokens` ids."""
        kind = self.rng.random()
        if kind < self.REPEAT_SHARE:
            ids = self.repeated(n_tokens)
        elif kind < self.REPEAT_SHARE + self.CHAT_SHARE:
            ids = self.chat(n_tokens)
        else:
            ids = self.passage(n_tokens)
        return ids if self.rng.random() < self.NO_BOS_SHARE else np.concatenate([[BOS], ids[:-1]])

    def batch(self, phase: Phase) -> torch.Tensor:
        """Return ids of shape (batch, seq_tokens)."""
        rows = [self.window(phase.seq_tokens) for _ in range(phase.batch)]
        return torch.from_numpy(np.stack(rows))


# ---- model and training --------------------------------------------------------------------


def model_config() -> Gemma3TextConfig:
    """Return the architecture: Gemma 3 with 3.1 million parameters."""
    layers = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 640}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
    return Gemma3TextConfig(
        **layers,
        **heads,
        vocab_size=VOCAB_SIZE,
        query_pre_attn_scalar=64,
        max_position_embeddings=MAX_TOKENS,
        sliding_window=512,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        eos_token_id=[EOS, END_TURN],
    )


def make_optimizers(model: Gemma3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate_factor(step: int, total: int, warmup: int = 50) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def held_out_loss(model: Gemma3ForCausalLM, stream: np.ndarray) -> float:
    """Return the loss in nats per token over evenly spaced windows of a held-out stream."""
    starts = np.linspace(0, len(stream) - 512, 24).astype(int)
    rows = np.stack([np.concatenate([[BOS], stream[s : s + 511]]) for s in starts])
    losses = [next_token_loss(model, ids).item() for ids in torch.from_numpy(rows).split(8)]
    return float(np.mean(losses))


class Trainer:
    """Runs the phases, measures held-out losses and saves as it goes."""

    def __init__(self, out: Path, seed: int, lr: float):
        self.out, self.lr = out, lr
        corpus = load_corpus(Path(sysconfig.get_paths()["stdlib"]))
        self.tokenizer = train_tokenizer(corpus["code"] + corpus["prose"])
        self.streams = {name: token_stream(self.tokenizer, corpus[name]) for name in corpus}
        code, prose = self.streams["code"], self.streams["prose"]
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.sampler = WindowSampler(code, prose, newline, seed)
        with torch.random.fork_rng():  # the weights' start comes from `seed` alone
            torch.manual_seed(seed)
            self.model = Gemma3ForCausalLM(model_config())
        self.log = {"seed": seed, "peak_lr": lr, "parameters": self.model.num_parameters()}
        self.log |= {"code_tokens": len(code), "prose_tokens": len(prose), "losses": []}

    def measure(self, step: int, seen_tokens: int, train_loss: float, elapsed_s: float) -> None:
        """Add a row of losses to the log, print it, and save the model."""
        row = {"step": step, "seen_tokens": seen_tokens, "elapsed_s": round(elapsed_s)}
        row["train"] = round(train_loss, 3)
        for name in ("code_held_out", "prose_held_out"):
            row[name] = round(held_out_loss(self.model, self.streams[name]), 3)
        self.log["losses"].append(row)
        print(json.dumps(row), flush=True)
        self.save()

    def save(self) -> None:
        """Write bfloat16 weights, tokenizer and log, replacing the folder by one rename."""
        fresh, stale = (self.out.with_name(self.out.name + end) for end in (".new", ".old"))
        shutil.rmtree(fresh, ignore_errors=True)
        half = Gemma3ForCausalLM(self.model.config).to(torch.bfloat16)
        half.load_state_dict(self.model.state_dict())
        half.save_pretrained(fresh)
        self.tokenizer.save_pretrained(fresh)
        (fresh / "model.safetensors").chmod(0o644)  # written readable by its owner alone
        (fresh / "training_log.json").write_text(json.dumps(self.log, indent=1) + "\n")
        if self.out.exists():
            self.out.rename(stale)
        fresh.rename(self.out)
        shutil.rmtree(stale, ignore_errors=True)

    def run(self, phases: tuple[Phase, ...], measure_every: int = 150) -> None:
        """Train through `phases`, saving every `measure_every` steps and at the end."""
        self.log["phases"] = [phase._asdict() for phase in phases]
        plan = [phase for phase in phases for _ in range(phase.steps)]
        optimizers = make_optimizers(self.model, self.lr)
        begin_s, seen_tokens, recent = time.monotonic(), 0, []
        for step, phase in enumerate(plan, start=1):
            factor = learning_rate_factor(step - 1, len(plan))
            recent.append(self.update(optimizers, self.lr * factor, phase))
            seen_tokens += phase.batch * phase.seq_tokens
            if step % measure_every == 0 or step == len(plan):
                self.measure(step, seen_tokens, float(np.mean(recent)), time.monotonic() - begin_s)
                recent = []

    def update(self, optimizers: list[torch.optim.Optimizer], lr: float, phase: Phase) -> float:
        """Make one optimizer step and return its loss in nats per token."""
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr
        # In float32: under bfloat16 autocast a step took 1.2 to 1.6 times as long on 2 CPU cores.
        loss = next_token_loss(self.model, self.sampler.batch(phase))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()


def scaled(phases: tuple[Phase, ...], scale: float) -> tuple[Phase, ...]:
    """Return the phases with `scale` times as many steps."""
    return tuple(phase._replace(steps=max(1, round(phase.steps * scale))) for phase in phases)


def main() -> None:
    """Train and save; `--out`, `--seed` and `--scale` as in the options' help."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=user_path, default=Path("data/demo_model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps")
    args = parser.parse_args()
    Trainer(args.out, args.seed, args.lr).run(scaled(PHASES, args.scale))


if __name__ == "__main__":
    main()

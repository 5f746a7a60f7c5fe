"""Train a model of moeut.py on text. `python train.py` needs no argument and no network.

    python train.py                                  the Python standard library, on whatever device is there
    python train.py --data=book.txt                  your text: files, folders, patterns
    python train.py --resume                         go on where a run stopped
    python train.py --preset=moeut-44M --n_layer=8   another model
    python train.py --init_from=other/run            begin with the weights of another run, or of the paper's authors
    torchrun --nproc_per_node=4 train.py             data parallel on four GPUs (on a CPU it is so by itself)
    python train.py --bench                          speed and memory beside the dense Transformer, nothing is trained
    python train.py --compare runs/*                 results of finished runs, over seeds

From top to bottom: the options; the tokenizer; text to tokens; checkpoints; training; the bench; the comparison.
"""

import argparse
import atexit
import base64
import codecs
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist

import cvmm
from moeut import PRESETS, MoEUT, MoEUTConfig, Router, count_params, dense_counterpart, preset

# ---------------------------------------------------------------------------------------------------
# Options: one dataclass is the command line


def option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    data: list[str] = option([], "text files, folders or patterns; none: the Python standard library")
    tokenizer: str = option("bytes", "bytes, a name known to tiktoken such as gpt2, a .tiktoken file, or a SentencePiece .model")
    out: str = option("out", "folder for the checkpoint and the tokenized text")
    resume: bool = option(False, "go on from the checkpoint in --out, with the options it was started with")
    preset: str = option("tiny", "model to start from (see PRESETS in moeut.py)")
    init_from: str = option("", "begin with the weights of a checkpoint: of this program or of the paper's authors")
    steps: int = option(1100, "optimizer steps")
    tokens_per_step: int = option(2048, "tokens for one optimizer step, over all processes")
    batch_size: int = option(8, "sequences at a time; the rest of a step is accumulated")
    lr: float = option(5e-3, "peak learning rate; the paper: 2.5e-4")
    warmup: int = option(50, "steps of linear warmup")
    hold: float = option(0.6, "the peak is held until this share of the steps, then a cosine; the paper: 0, all cosine")
    final_lr: float = option(0.02, "where the cosine ends, as a fraction of the peak; the paper: 0.1")
    weight_decay: float = option(0.1, "of AdamW, on all parameters; the paper: 0.01")
    beta1: float = option(0.7, "of AdamW; the paper: 0.9, better for longer runs")
    beta2: float = option(0.99, "of AdamW; the paper: 0.999")
    grad_clip: float = option(1.0, "largest gradient norm; the paper: 0.1 for the 44M model, else 0.25")
    seed: int = option(0, "of the initialisation and of the order of the batches")
    eval_interval: int = option(220, "steps between evaluations, each with a checkpoint and a sample")
    eval_tokens: int = option(16384, "validation tokens of one evaluation; the last one takes 8 times as many")
    log_interval: int = option(50, "steps between log lines")
    sample_tokens: int = option(160, "length of the samples printed during training")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    processes: int = option(0, "on a CPU, data-parallel processes that share its cores; 0: as many as cores, up to 4")
    dtype: str = option("auto", "precision of the matmuls: auto, float32, bfloat16, float16")
    compile: str = option("auto", "torch.compile: auto (on CUDA), yes, no")
    recompute: bool = option(False, "activation checkpointing: less memory, more time")
    bench: bool = option(False, "train MoEUT and the dense Transformer with as many parameters in turn, on random tokens, "
                                "and print the ratios")
    compare: list[str] = option([], "folders of finished runs: print their results side by side")


def write_aside(path: Path, write):
    """Call write(other path), then rename to path: a crash never leaves half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, without the page of usage
        self.exit(2, f"{self.prog}: {message}; --help lists all options.\n")


def parse_options(cls, doc: str, extra=None, argv=None) -> dict:
    """The options given on the command line, and only those, by name.

    cls is a dataclass whose fields carry a help text; extra is one whose fields may be given as well.
    """
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model", "change a field of the preset; MoEUTConfig in moeut.py explains them")
    for owner, target in ((cls, parser), (extra, model)):
        for f in fields(owner) if owner else ():
            default = f.default if f.default is not MISSING else f.default_factory()
            text = f.metadata.get("help")
            kind = dict(type=type(default), metavar=type(default).__name__.upper())
            if isinstance(default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(default, list):
                kind = dict(nargs="+", metavar="PATH")
            elif text and default != "":
                text += f" (default {default})"
            names = {f"--{f.name}", f"--{f.name.replace('_', '-')}"}
            target.add_argument(*sorted(names), dest=f.name, default=argparse.SUPPRESS, help=text, **kind)
    return vars(parser.parse_args(argv))


def check(options: Options):
    """Refuse numbers that make no sense, in one sentence."""
    least = dict.fromkeys(("steps", "tokens_per_step", "batch_size", "eval_interval", "eval_tokens", "log_interval"), 1)
    least |= dict.fromkeys(("processes", "warmup", "weight_decay", "sample_tokens", "final_lr", "seed"), 0)
    for name, low in least.items():
        if not low <= getattr(options, name) < 2**63:
            sys.exit(f"--{name} is {getattr(options, name)}: it must be at least {low}.")
    for name in ("lr", "grad_clip"):
        if not 0 < getattr(options, name) < math.inf:
            sys.exit(f"--{name} is {getattr(options, name)}: it must be above 0.")
    for name in ("beta1", "beta2", "hold"):
        if not 0 <= getattr(options, name) < 1:
            sys.exit(f"--{name} is {getattr(options, name)}: it must be at least 0 and below 1.")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        sys.exit(f"--out is {options.out}, which is a file: give a folder.")
    for name, choices in {"dtype": ("auto", "float32", "bfloat16", "float16"), "compile": ("auto", "yes", "no")}.items():
        if getattr(options, name) not in choices:
            sys.exit(f"--{name} is {getattr(options, name)!r}: choose one of {', '.join(choices)}.")


# ---------------------------------------------------------------------------------------------------
# Device


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError):
        sys.exit(f"There is no device {name!r} on this machine: --device=cpu always works.")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What the device is fast in: bfloat16 on newer GPUs, float16 on older ones and on Apple's. CPUs
    without matrix units multiply bfloat16 at half the speed of float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


# ---------------------------------------------------------------------------------------------------
# Tokenizer: a tiktoken.Encoding, described by plain data so that a checkpoint can hold it

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str) -> dict:
    """What defines the tokenizer of that name: pat_str, mergeable_ranks and special_tokens, or a SentencePiece model."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return dict(name=name, pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    if name.endswith(".tiktoken"):
        try:
            lines = Path(name).read_bytes().splitlines()
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, filter(None, lines))}
        except OSError as e:
            sys.exit(f"The tokenizer {name} cannot be read: {e.strerror}.")
        except ValueError:
            ranks = {}
        if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
            sys.exit(f"{name} is not a .tiktoken file: each line must hold a token in base64 and its rank.")
        words = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        return dict(name=name, pat_str=words, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})
    if name.endswith(".model"):
        try:
            return dict(name=name, sentencepiece=Path(name).read_bytes())
        except OSError as e:
            sys.exit(f"The tokenizer {name} cannot be read: {e.strerror}.")
    if name not in tiktoken.list_encoding_names():
        sys.exit(f"There is no tokenizer {name!r}: give bytes, a .tiktoken or .model file, or one of {', '.join(tiktoken.list_encoding_names())}.")
    try:
        e = tiktoken.get_encoding(name)
    except Exception:
        sys.exit(f"The tokenizer {name} could not be downloaded: without a network use --tokenizer=bytes or a .tiktoken file.")
    return dict(name=name, pat_str=e._pat_str, mergeable_ranks=e._mergeable_ranks, special_tokens=e._special_tokens)


class SentencePiece:
    """A SentencePiece model as far as Tokenizer needs a tiktoken.Encoding. The authors' models have such tokenizers."""

    def __init__(self, name: str, sentencepiece: bytes):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            sys.exit(f"The tokenizer {name} needs the package sentencepiece: pip install -e '.[sentencepiece]'")
        try:
            self.processor = SentencePieceProcessor(model_proto=sentencepiece)
        except RuntimeError:
            sys.exit(f"{name} is not a SentencePiece model.")
        self.n_vocab, self.end = self.processor.get_piece_size(), self.processor.eos_id()
        if self.end < 0:
            sys.exit(f"The SentencePiece model {name} has no end-of-text token: train it with one (eos_id).")

    def encode_to_numpy(self, text: str, disallowed_special) -> np.ndarray:
        return np.array(self.processor.encode(text), np.uint32)

    def decode_single_token_bytes(self, token: int) -> bytes:
        piece = self.processor.id_to_piece(token)
        if self.processor.is_byte(token):  # such as <0x0A>
            return bytes([int(piece[1:-1], 16)])
        return b"" if self.processor.is_control(token) else piece.replace("\u2581", " ").encode()


class Tokenizer:
    """encode and decode, and the token `end` that closes a document."""

    def __init__(self, spec: dict):
        self.spec = spec
        if "sentencepiece" in spec:
            self.encoding, self.unknown = SentencePiece(**spec), set()
            self.end = self.encoding.end
        else:
            self.encoding = tiktoken.Encoding(**spec)
            self.unknown = {bytes([i]) for i in range(256)} - spec["mergeable_ranks"].keys()
            self.end = spec["special_tokens"][END_OF_TEXT]
        self.n_vocab = self.encoding.n_vocab

    def fingerprint(self) -> str:
        """The same for tokenizers that encode alike."""
        if "sentencepiece" in self.spec:
            return hashlib.sha256(self.spec["sentencepiece"]).hexdigest()
        ranks = b"".join(k + b"%d" % v for k, v in sorted(self.spec["mergeable_ranks"].items()))
        return hashlib.sha256(json.dumps([self.spec["pat_str"], self.spec["special_tokens"]]).encode() + ranks).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids as uint32; special tokens in the text are text. Raises ValueError for a character
        that the tokenizer has no tokens for."""
        if self.unknown or not text.isascii():
            for character in sorted(set(text)):
                try:
                    known = not any(bytes([b]) in self.unknown for b in character.encode())
                except UnicodeEncodeError:
                    known = False
                if not known:
                    raise ValueError(f"The tokenizer {self.spec['name']} cannot encode the character {character!r}.")
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def stream(self, tokens):
        """Text of the tokens as they come, in whole characters; stops after the end-of-text token."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if token == self.end:
                break
            if token < self.n_vocab:  # the others only pad the model's vocabulary
                yield decoder.decode(self.encoding.decode_single_token_bytes(token))
        yield decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------
# Text to tokens: written once to memory-mapped files, found again by a fingerprint of text and tokenizer

VALIDATION = 0.1  # of the text


def find_files(patterns: list[str]) -> list[Path]:
    """The text files that --data names, sorted."""
    if not patterns:  # the standard library: real code and prose, on every machine
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    files = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            found = [path] if path.is_file() else [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not found:
            sys.exit(f"--data: there is no text at {pattern!r}: give a file, a folder with files, or a pattern.")
        files.update(found)
    return sorted(files)


def blocks(path: Path, start: int, stop: int, size: int = 1 << 20):
    """The text of bytes start..stop-1 in blocks of about `size` bytes that end with a line."""
    with open(path, "rb") as file:
        file.seek(start)
        rest = b""
        while start < stop:
            data = file.read(min(size, stop - start))
            if not data:
                break
            start += len(data)
            rest += data
            cut = rest.rfind(b"\n") + 1 if start < stop else len(rest)
            if cut:
                yield rest[:cut].decode()
                rest = rest[cut:]


def split_point(path: Path, size: int) -> int:
    """Where the last tenth of a single file begins: never inside a character."""
    point = int(size * (1 - VALIDATION))
    with open(path, "rb") as file:
        file.seek(point)
        ahead = file.read(4)
    return point + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


@dataclass
class Corpus:
    n_files: int
    train: np.ndarray  # token ids, memory-mapped
    val: np.ndarray
    bytes_per_token: dict[str, float]  # of train and of val


def tokenize(patterns: list[str], tokenizer: Tokenizer, folder: Path, block_size: int) -> Corpus:
    """The tokens of the text, from the cache in `folder` if text and tokenizer are the same as then.

    A document is a file; every document ends with an end-of-text token. One document in ten, chosen
    by a hash of its first bytes, is for validation; of a single file, the last tenth is.
    """
    files = find_files(patterns)
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = json.dumps([3, stats, tokenizer.fingerprint(), VALIDATION])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    done = folder / f"{name}.json"

    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        total, read, skipped, shown = sum(size for _, size, _ in stats), 0, 0, time.time()
        count = {"train": [0, 0], "val": [0, 0]}  # tokens, bytes
        paths = {split: folder / f"{name}.{split}" for split in count}
        with open(f"{paths['train']}.part", "wb") as train, open(f"{paths['val']}.part", "wb") as val:
            for path, (_, size, _) in zip(files, stats):
                if len(files) == 1:
                    point = split_point(path, size)
                    parts = [("train", 0, point), ("val", point, size)]
                else:
                    with open(path, "rb") as file:
                        chosen = hashlib.sha256(file.read(4096)).digest()[0] < 256 * VALIDATION
                    parts = [("val" if chosen else "train", 0, size)]
                for split, start, stop in parts:
                    out = train if split == "train" else val
                    try:
                        for text in blocks(path, start, stop):
                            ids = tokenizer.encode(text).astype(dtype)
                            out.write(ids)
                            n_bytes = len(text.encode())
                            count[split][0] += len(ids)
                            count[split][1] += n_bytes
                            read += n_bytes
                            if time.time() - shown > 2:
                                shown = time.time()
                                print(f"tokenizing: {read / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
                        if stop == size:
                            out.write(np.array([tokenizer.end], dtype))
                            count[split][0] += 1
                    except UnicodeDecodeError:
                        if len(files) == 1:
                            sys.exit(f"{path} is not UTF-8 text: convert it first.")
                        skipped += 1
                    except ValueError as e:
                        sys.exit(str(e))
        if skipped:
            print(f"skipped {skipped} files that are not UTF-8 text")
        for path in paths.values():
            os.replace(f"{path}.part", path)
        write_aside(done, lambda part: part.write_text(json.dumps(count)))

    count = json.loads(done.read_text())
    for split, (n_tokens, _) in count.items():
        if n_tokens < block_size + 1:
            which = "training" if split == "train" else "validation"
            sys.exit(
                f"The {which} part of the text has {n_tokens} tokens, fewer than the {block_size + 1} of one "
                "sequence: give more text or a smaller --block_size.")
    return Corpus(
        len(files), *(np.memmap(folder / f"{name}.{split}", dtype, mode="r") for split in count),
        bytes_per_token={split: n_bytes / n_tokens for split, (n_tokens, n_bytes) in count.items()})


def to_device(rows: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, T], one token apart, of rows [B, T + 1]."""
    batch = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        batch = batch.pin_memory()
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]


@functools.lru_cache(maxsize=2)
def epoch_start(seed: int, epoch: int, n_offset: int, n_window: int) -> tuple[int, int]:
    """The offset of an epoch's windows, and which of them comes first."""
    offset, first = np.random.default_rng((seed, epoch)).integers((n_offset, n_window))
    return int(offset), int(first)


def windows(data: np.ndarray, block_size: int, numbers, seed: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, T] of the training windows of these numbers.

    The text is cut into windows at an offset that changes every epoch. The windows of an epoch come
    in the order of steps of about 0.618 of its length, which visits each once and leaves no state
    behind: a resumed run sees what an uninterrupted one would.
    """
    n = (len(data) - block_size - 1) // block_size or 1
    stride = next(s for s in range(max(int(0.618 * n), 1), 2 * n + 1) if math.gcd(s, n) == 1)
    rows = []
    for number in numbers:
        epoch, i = divmod(number, n)
        offset, first = epoch_start(seed, epoch, min(block_size, len(data) - n * block_size), n)
        start = offset + block_size * ((i * stride + first) % n)
        rows.append(data[start:start + block_size + 1])
    return to_device(np.stack(rows), device)


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(
    folder: Path, trainer: "Trainer", step: int, options: Options, tokenizer: Tokenizer, history: list[dict]
):
    """Everything that sampling and --resume need, in one file of plain data and tensors.

    history has an entry for each evaluation: step, seconds of training, loss, bits per byte, peak MiB.
    """
    checkpoint = dict(
        step=step, options=asdict(options), config=asdict(trainer.model.config), tokenizer=tokenizer.spec, history=history,
        model=trainer.model.state_dict(), optimizer=trainer.optimizer.state_dict(), scaler=trainer.scaler.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "checkpoint.pt", lambda part: torch.save(checkpoint, part))


OURS = {"step", "options", "config", "tokenizer", "history", "model", "optimizer", "scaler"}


def read_checkpoint(path: Path) -> dict:
    """What is in the file, or in checkpoint.pt of the folder; empty if that is no dict of plain data and tensors."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        sys.exit(f"There is no checkpoint at {path}: `python train.py` makes one, --out says where.")
    theirs = "framework.data_structures.dotdict.DotDict"  # a class in the authors' checkpoints, read as a dict
    try:
        with torch.serialization.safe_globals([(dict, theirs)]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever unpickling a foreign file may raise
        return {}
    return checkpoint if isinstance(checkpoint, dict) else {}


def load_checkpoint(path: Path) -> dict:
    checkpoint = read_checkpoint(path)
    if not checkpoint.keys() >= OURS:
        sys.exit(f"{path} is not a checkpoint of this train.py.")
    return checkpoint


def official_config(args: dict, weights: dict) -> MoEUTConfig:
    """The sizes of a model of the authors' training code, from its command line and its weights. Raises ValueError
    for a setting that MoEUTConfig does not have: the names and shapes of the weights would not show it."""
    for name, value in (("transformer.universal.group_type", "abab"), ("rope.rotate_fraction", 0.5), ("rope.base", 10000)):
        if args.get(name, value) != value:
            raise ValueError(f"it was trained with {name} {args[name]}, and only {value} is known here")
    E, C, F = weights["unique_layers.0.pkm.keys"].shape
    n_head = args["transformer.n_heads"]
    return MoEUTConfig(
        vocab_size=len(weights["embedding.weight"]), block_size=args["lm.unroll"], n_layer=args["transformer.encoder_n_layers"],
        group_size=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("unique_layers.")),
        n_embd=C, n_head=n_head, head_size=len(weights["unique_layers.0.self_attn.projections.q"]) // n_head,
        n_expert=E, expert_size=F, top_k=args["pkm.n_heads"],
        n_att_expert=len(weights["unique_layers.0.self_attn.selections.v"]) // n_head, att_top_k=args["moe.att.k"])


def load_model(path: Path, tokenizer: str, preset_name: str, changes: dict) -> tuple[MoEUT, Tokenizer]:
    """The model and the tokenizer of a checkpoint: of this program, or of the paper's authors.

    Theirs hold no tokenizer: it is the one named. Those of their training code say the sizes of the model; a
    bare state dict of their clean repository has those of the preset with the changes.
    """
    stored = read_checkpoint(path)
    args = (stored.get("run_invariants") or {}).get("args")
    if changes and (args or stored.keys() >= OURS):
        sys.exit(f"--{next(iter(changes))} cannot be changed: the checkpoint {path} says what the model is.")
    if stored.keys() >= OURS:
        model = MoEUT(MoEUTConfig(**stored["config"]))
        model.load_state_dict(stored["model"])
        return model, Tokenizer(stored["tokenizer"])
    weights = stored.get("model", stored)
    try:
        config = official_config(args, weights) if args else preset(
            preset_name, vocab_size=len(weights["embedding.weight"]), **changes)
        model = MoEUT.from_official(weights, config)
        theirs = Tokenizer(load_tokenizer(tokenizer))
        if theirs.n_vocab == config.vocab_size:
            return model, theirs
        sys.exit(f"The model in {path} knows {config.vocab_size} tokens and the tokenizer {tokenizer} has {theirs.n_vocab}: "
                 "give the one that it was trained with, --tokenizer=file.model")
    except KeyError as e:
        reason = f"{e} is missing"
    except ValueError as e:
        reason = str(e)
    sys.exit(f"{path} is not a checkpoint of this train.py, nor can it be read as one of the authors: {reason.rstrip('.')}.")


# ---------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, options: Options) -> float:
    """Linear warmup to the peak, which is held for a while, then a cosine to final_lr of it."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    begin = max(options.warmup, options.hold * options.steps)
    progress = (step - begin) / max(options.steps - begin, 1)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0), 1))
    return options.lr * (options.final_lr + (1 - options.final_lr) * cosine)


@torch.no_grad()
def evaluate(model: MoEUT, data: np.ndarray, n_tokens: int, batch_size: int, autocast) -> tuple[float, float | None]:
    """Mean loss in nats per token on windows spread evenly over `data`, always the same ones, and the
    share of all experts that were chosen at least once (None without experts)."""
    T, device = model.config.block_size, next(model.parameters()).device
    count = max(min(n_tokens, len(data) - 1) // T, 1)
    starts = np.linspace(0, len(data) - T - 1, count).astype(np.int64)

    chosen = {}

    def note(router, _, logits):
        experts = logits.unflatten(-1, (router.n_choice, -1)).flatten(0, 1)      # [N, n_choice, experts]
        mask = torch.zeros_like(experts, dtype=torch.bool).scatter_(-1, experts.topk(router.top_k).indices, True)
        chosen[router] = chosen.get(router, 0) | mask.any(0)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    model.eval()
    total = 0.0
    for i in range(0, count, batch_size):
        batch = starts[i:i + batch_size]
        x, y = to_device(np.stack([data[s:s + T + 1] for s in batch]), device)
        with autocast():
            total += model(x, y).loss.item() * len(batch)
    model.train()
    for hook in hooks:
        hook.remove()
    used = torch.cat([c.flatten() for c in chosen.values()]).float().mean().item() if chosen else None
    return total / count, used


def peak_memory(device: torch.device) -> float | None:
    """The most MiB held so far: on the GPU, or by the whole process. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def keep_freed_memory():
    """Let malloc keep what is freed. By default glibc returns large arrays to the kernel, which hands
    them back page by page, zeroed: a quarter of the time of a training step on a CPU."""
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:  # musl has none
            trim_threshold, top_pad, mmap_max = -1, -2, -4
            for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
                mallopt(parameter, value)


def prepare(device: torch.device):
    """Settings of the process."""
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)  # numbers below 1e-38 are slow, and nobody misses them
    torch.set_float32_matmul_precision("high")  # TF32 where there is nothing better


# Data parallel: torchrun starts the processes, one for each GPU. On a CPU this program does it by itself, because small
# matmuls on one core each, in several processes, are a third faster than the same ones on all cores.


def share_cores(options: Options, block_size: int) -> int:
    """How many processes to train with on a CPU: as many as cores, up to 4, that divide the sequences of a step evenly."""
    if options.processes:
        return options.processes
    sequences = options.tokens_per_step // block_size
    return next(n for n in range(min(torch.get_num_threads(), 4), 0, -1) if sequences % n == 0)


def start_others(n: int) -> str:
    """Start this command n - 1 times more, each with its share of the cores. They are ranks 1 to n - 1 and say nothing.
    Returns the address where rank 0, which is this process, has to meet them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threads = max(torch.get_num_threads() // n, 1)
    for rank in range(1, n):
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=n, RANK=rank, OMP_NUM_THREADS=threads)
        other = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:]], env=os.environ | {k: str(v) for k, v in env.items()},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(other.kill)
    torch.set_num_threads(threads)
    return f"tcp://127.0.0.1:{port}"


def agree(flag: bool) -> bool:
    """True if any process says so: all of them leave the loop after the same step."""
    if not dist.is_initialized():
        return flag
    any_flag = torch.tensor(int(flag))
    dist.all_reduce(any_flag, dist.ReduceOp.MAX)
    return bool(any_flag)


class Trainer:
    """A model and what its training steps need. `run` is the model, possibly compiled or data-parallel."""

    def __init__(self, model: MoEUT, device: torch.device, options: Options):
        self.model, self.device, self.grad_clip = model, device, options.grad_clip
        model.recompute = options.recompute
        self.dtype = pick_dtype(options.dtype, device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), options.lr, (options.beta1, options.beta2), weight_decay=options.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.compiled = options.compile == "yes" or options.compile == "auto" and device.type == "cuda"
        self.run = torch.compile(model) if self.compiled else model

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, batches: list):
        """Forward, backward and update on batches of inputs and targets, whose gradients add up. Returns loss,
        regulariser and gradient norm."""
        loss_sum = reg_sum = 0
        for i, (x, y) in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or not hasattr(self.run, "no_sync") else self.run.no_sync():
                with self.autocast():
                    _, loss, reg = self.run(x, y)
                self.scaler.scale((loss + reg) / len(batches)).backward()
            loss_sum, reg_sum = loss_sum + loss.detach() / len(batches), reg_sum + reg.detach() / len(batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum, reg_sum, norm


def train(options: Options, model_changes: dict, checkpoint: dict | None):
    check(options)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cores = torch.get_num_threads()
    if "RANK" in os.environ:  # started by torchrun, or by start_others
        on_gpu = torch.cuda.is_available() and options.device != "cpu"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        if on_gpu and options.device == "auto":
            options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    master = rank == 0
    say = print if master else lambda *_, **__: None
    device = pick_device(options.device)
    prepare(device)

    # Data and model.
    if checkpoint:
        tokenizer, config = Tokenizer(checkpoint["tokenizer"]), MoEUTConfig(**checkpoint["config"])
    else:
        if options.init_from:
            initial, tokenizer = load_model(Path(options.init_from), options.tokenizer, options.preset, model_changes)
            config = initial.config
        else:
            tokenizer = Tokenizer(load_tokenizer(options.tokenizer))
            try:
                config = preset(options.preset, **{"vocab_size": tokenizer.n_vocab, **model_changes})
            except ValueError as e:
                sys.exit(f"{e}")
        if config.vocab_size < tokenizer.n_vocab:
            sys.exit(f"The model's vocab_size is {config.vocab_size}, but the tokenizer {tokenizer.spec['name']} has {tokenizer.n_vocab} tokens.")
    T, out = config.block_size, Path(options.out)
    alone = "RANK" not in os.environ
    if alone and device.type == "cpu":
        world = share_cores(options, T)
    sequences, rest = divmod(options.tokens_per_step, T * world)
    batch_size = min(options.batch_size, sequences)
    if rest or not sequences or sequences % batch_size:
        sys.exit(
            f"--tokens_per_step is {options.tokens_per_step}: it must be a multiple of block_size x batch_size x "
            f"processes = {T} x {options.batch_size} x {world} = {T * options.batch_size * world}.")
    address = start_others(world) if alone and world > 1 else None
    if master:
        corpus = tokenize(options.data, tokenizer, out / "tokens", T)
    if address:
        dist.init_process_group("gloo", init_method=address, world_size=world, rank=0)
    if world > 1:
        dist.barrier()
    if not master:
        corpus = tokenize(options.data, tokenizer, out / "tokens", T)
    accumulate = sequences // batch_size

    torch.manual_seed(options.seed)
    model = (MoEUT(config) if checkpoint or not options.init_from else initial).to(device)
    trainer = Trainer(model, device, options)
    first_step, history = 0, []
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        trainer.scaler.load_state_dict(checkpoint["scaler"])
        first_step, history = checkpoint["step"], checkpoint["history"]
        checkpoint = None
        if first_step >= options.steps:
            sys.exit(f"The run in {out} has done its {first_step} steps: --steps=N with a larger N goes on.")
    if world > 1:
        trainer.run = torch.nn.parallel.DistributedDataParallel(trainer.run)

    flops = config.estimate_flops()
    peak = cvmm.device_peak(device) if trainer.dtype != torch.float32 else None
    size = lambda path: f"{len(path) / 1e6:.1f}M"
    say(f"text: {corpus.n_files} file{'s' * (corpus.n_files > 1)}, {size(corpus.train)} training and "
        f"{size(corpus.val)} validation tokens ({tokenizer.spec['name']})")
    say(f"model: {options.preset}, {model.n_params():,} parameters, {config.macs_per_token():,} MACs per token")
    say(f"device: {device}, {str(trainer.dtype)[6:]}, {'compiled' if trainer.compiled else 'not compiled'}, experts by "
        f"{cvmm.backend(device)}" + (f", {world} processes" if world > 1 else ""))
    changed = " ".join(f"--{k}={v}" for k, v in asdict(options).items() if v != getattr(Options(), k))
    say("options: " + (changed or "all as they are by default"))

    # Ctrl-C ends the loop after the step it is in; a second one ends the program.
    stop = []

    def interrupted(*_):
        stop.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupted)

    bits = {split: 1 / math.log(2) / per_token for split, per_token in corpus.bytes_per_token.items()}
    model.train()
    step, began, stopping = first_step, time.time(), False
    earlier = history[-1]["seconds"] if history else 0.0
    started, logged = began, (began, first_step)  # both move on by the time of evaluations
    while step < options.steps and not stopping:
        lr = learning_rate(step, options)
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(options.seed + step)  # of dropout, so that a resumed run goes on alike
        batches = []
        for micro in range(accumulate):
            number = ((step * accumulate + micro) * world + rank) * batch_size
            batches.append(windows(corpus.train, T, range(number, number + batch_size), options.seed, device))
        loss_sum, reg_sum, norm = trainer.step(batches)
        step += 1

        done, stopping = step == options.steps, agree(bool(stop))
        if step == first_step + 1:
            memory = peak_memory(device)
            if memory:
                say(f"peak memory of a step: {memory:,.0f} MiB" + (", all of a process" if device.type == "cpu" else ""))
        if step % options.log_interval == 0 or step == first_step + 1 or done:
            loss, now = loss_sum.item(), time.time()  # .item() waits for the device
            rate = (step - logged[1]) / (now - logged[0])
            eta = (options.steps - step) * (now - started) / (step - first_step)
            line = (
                f"step {step}/{options.steps}: loss {loss:.3f}, {loss * bits['train']:.3f} bits/byte, "
                f"reg {reg_sum.item():.3f}, lr {lr:.1e}, grad {norm.item():.2f}, "
                f"{rate * options.tokens_per_step:,.0f} tokens/s, {eta // 60:.0f}m{eta % 60:02.0f}s to go")
            if peak:
                line += f", {rate * options.tokens_per_step * flops / peak[0] / world:.1%} MFU"
            say(line, flush=True)
            logged = now, step
            if not math.isfinite(loss):
                sys.exit(f"The loss is {loss} at step {step}: start again with a smaller --lr; the last checkpoint is kept.")
        if step % options.eval_interval == 0 or done or stopping:
            paused = time.time()
            threads = torch.get_num_threads()
            torch.set_num_threads(cores)  # the other processes wait
            if master and not stopping:
                n_tokens = options.eval_tokens * (8 if done else 1)
                loss, used = evaluate(model, corpus.val, n_tokens, batch_size, trainer.autocast)
                history.append(dict(step=step, seconds=earlier + paused - started, loss=loss, bits=loss * bits["val"],
                                    peak_mib=peak_memory(device)))
                line = f"step {step}/{options.steps}: validation loss {loss:.4f}, {loss * bits['val']:.4f} bits/byte"
                say(line + (f", {used:.0%} of the experts in use" if used is not None else ""))
            if master:
                save_checkpoint(out, trainer, step, options, tokenizer, history)
            stopping = agree(bool(stop))
            if stopping:
                break
            if master:
                generator = torch.Generator(device).manual_seed(options.seed)
                prompt = torch.tensor([[tokenizer.end]], device=device)
                model.eval()
                tokens = (t.item() for t in model.generate(prompt, options.sample_tokens, 0.8, generator=generator))
                say("".join(["-" * 60, "\n", *tokenizer.stream(tokens), "\n", "-" * 60]), flush=True)
                model.train()
            torch.set_num_threads(threads)
            if world > 1:
                dist.barrier()
            now = time.time()
            started, logged = started + now - paused, (now, step)
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        sys.exit(f"Stopped after step {step}, saved in {out}: `python train.py --resume --out={out}` goes on.")
    say(f"done in {time.time() - began:.0f} s, saved in {out}; now `python sample.py --out={out}`")


# ---------------------------------------------------------------------------------------------------
# The bench: MoEUT and the dense Transformer take turns. Each has its own process, and so its own peak memory.

DECODE_CONTEXT = 1024  # tokens that a decoded token attends to


def bench_worker(pipe, config: MoEUTConfig, options: Options):
    """Answers requests from the pipe: "step", "cached" and "uncached" with seconds, "memory" with MiB."""
    device = pick_device(options.device)
    prepare(device)
    empty = 0 if device.type == "cuda" else peak_memory(device)
    torch.manual_seed(options.seed)
    # generate() keeps within block_size: long enough for all that is decoded
    model = MoEUT(replace(config, block_size=2 * DECODE_CONTEXT)).to(device)
    trainer = Trainer(model, device, options)
    text = torch.randint(config.vocab_size, (options.batch_size, config.block_size + 1), device=device)
    prompt = torch.randint(config.vocab_size, (1, DECODE_CONTEXT), device=device)
    tokens = model.generate(prompt, DECODE_CONTEXT, temperature=0)  # begins with the first request

    def step():
        trainer.step([(text[:, :-1], text[:, 1:])])[0].item()

    def cached():
        next(tokens).item()

    @torch.inference_mode()
    def uncached():
        model(prompt).logits[:, -1].argmax().item()

    for request in iter(pipe.recv, "stop"):
        if request == "memory":
            memory = peak_memory(device)
            pipe.send(memory and memory - empty)
            continue
        function, repeats = {"step": (step, 1), "cached": (cached, 32), "uncached": (uncached, 1)}[request]
        model.train(request == "step")
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        pipe.send((time.perf_counter() - start) / repeats)


def bench(options: Options, model_changes: dict, rounds: int = 7):
    """Time MoEUT and the dense Transformer of the same size in turn, and print the ratios."""
    names = [options.preset, dense_counterpart(options.preset)]
    if names[0] == names[1] or names[1] not in PRESETS:
        sys.exit(f"--bench compares a preset with its dense counterpart: --preset={options.preset} has none.")
    changes = {k: v for k, v in model_changes.items() if k in ("vocab_size", "block_size")}
    if changes != model_changes:
        sys.exit(f"--bench takes presets as they are: --{next(iter(model_changes.keys() - changes))} cannot be changed.")
    try:
        configs = [preset(name, **changes) for name in names]
    except ValueError as e:
        sys.exit(f"{e}")
    context = torch.multiprocessing.get_context("spawn")
    pipes = []
    for config in configs:
        here, there = context.Pipe()
        context.Process(target=bench_worker, args=(there, config, options), daemon=True).start()
        pipes.append(here)

    def ask(request: str, rounds: int = 1, warmup: int = 0) -> list[float]:
        """The median answer of each of the two."""
        answers = [[], []]
        for _ in range(warmup + rounds):
            for pipe, answer in zip(pipes, answers):
                pipe.send(request)
                answer.append(pipe.recv())
        return [statistics.median(a[warmup:]) if a[-1] is not None else math.nan for a in answers]

    device = pick_device(options.device)
    n_tokens = options.batch_size * configs[0].block_size
    print(f"torch {torch.__version__}, {device}, {str(pick_dtype(options.dtype, device))[6:]}, compile {options.compile}; a step is "
          f"{options.batch_size} x {configs[0].block_size} tokens, decoding at {DECODE_CONTEXT} tokens; medians of {rounds} rounds in turn")
    print(f"{'':34} {names[0]:>14} {names[1]:>14}  ratio")

    def line(name: str, values: list[float], decimals: int = 0):
        print(f"{name:34} {values[0]:14,.{decimals}f} {values[1]:14,.{decimals}f} {values[0] / values[1]:6.2f}", flush=True)

    line("parameters", [count_params(c) for c in configs])
    line("MACs per token", [c.macs_per_token() for c in configs])
    seconds = ask("step", rounds, warmup=3)
    line("training step, ms", [t * 1e3 for t in seconds], 1)
    line("training, tokens/s", [n_tokens / t for t in seconds])
    line("peak memory of training, MiB", ask("memory"))
    cached, uncached = ask("cached", rounds, warmup=1), ask("uncached", rounds, warmup=1)
    line("decoding, tokens/s", [1 / t for t in cached], 1)
    line("decoding without a cache, tokens/s", [1 / t for t in uncached], 1)
    line("the cache makes it faster by", [b / a for a, b in zip(cached, uncached)], 1)
    for pipe in pipes:
        pipe.send("stop")


# ---------------------------------------------------------------------------------------------------
# Finished runs side by side


def compare(folders: list[str], picture: Path):
    """A line for each model, over the seeds it was trained with, and a picture of loss against compute."""
    groups, common = {}, None
    for folder in folders:
        run = load_checkpoint(Path(folder))
        options, config = run["options"], MoEUTConfig(**run["config"])
        if not run["history"]:
            sys.exit(f"The run in {folder} has no evaluation yet: let it go on with --resume.")
        conditions = {k: options[k] for k in ("data", "tokenizer", "tokens_per_step")} | {"step": run["step"]}
        common = common or conditions
        for k, v in conditions.items():
            if v != common[k]:
                sys.exit(f"The runs cannot be compared: {k} is {common[k]} in {folders[0]} and {v} in {folder}.")
        original = preset(options["preset"], vocab_size=config.vocab_size)
        changed = [f" {f.name}={getattr(config, f.name)}" for f in fields(config)
                   if getattr(config, f.name) != getattr(original, f.name)]
        groups.setdefault(options["preset"] + "".join(changed), []).append((config, run["history"]))

    print(f"{common['step']} steps of {common['tokens_per_step']} tokens; bits per byte of the validation text: mean, lowest and "
          f"highest; seconds and MiB: medians\n{'model':32} runs  parameters  MACs/token  bits/byte    (low    high)  seconds    MiB")
    mean_of_last = lambda runs: statistics.mean(history[-1]["bits"] for _, history in runs)
    groups = dict(sorted(groups.items(), key=lambda item: mean_of_last(item[1])))
    for name, runs in groups.items():
        config, last = runs[0][0], [history[-1] for _, history in runs]
        bits = [entry["bits"] for entry in last]
        median = lambda key: statistics.median(entry[key] or math.nan for entry in last)
        print(f"{name:32} {len(runs):4} {count_params(config):11,} {config.macs_per_token():11,} {mean_of_last(runs):10.4f} {min(bits):8.4f}"
              f"{max(bits):8.4f} {median('seconds'):8.0f} {median('peak_mib'):6.0f}")

    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: it needs matplotlib, pip install -e '.[plot]'")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, runs in groups.items():
        steps = [entry["step"] for entry in runs[0][1]]
        curves = [[entry["bits"] for entry in history] for _, history in runs]
        flops = [step * common["tokens_per_step"] * runs[0][0].estimate_flops() for step in steps]
        axes.plot(flops, [statistics.mean(at) for at in zip(*curves)], label=name)
        axes.fill_between(flops, [min(at) for at in zip(*curves)], [max(at) for at in zip(*curves)], alpha=0.3)
    axes.set(xscale="log", xlabel="floating point operations of training", ylabel="validation loss, bits per byte")
    axes.legend()
    figure.savefig(picture)
    print(f"loss against compute: {picture}")


def main():
    given = parse_options(Options, __doc__, MoEUTConfig)
    names = {f.name for f in fields(Options)}
    chosen = {k: v for k, v in given.items() if k in names}
    model_changes = {k: v for k, v in given.items() if k not in names}
    if chosen.get("bench"):
        options = Options(**{"preset": "small", **chosen})
        check(options)
        return bench(options, model_changes)
    if "compare" in chosen:
        return compare(chosen["compare"], Path(chosen.get("out", ".")) / "compare.svg")
    checkpoint = None
    if chosen.get("resume"):
        fixed = [f"--{k}" for k in (*model_changes, "preset", "tokenizer") if k in given]
        if fixed:
            sys.exit(f"{fixed[0]} cannot be changed by --resume: it belongs to the checkpoint.")
        checkpoint = load_checkpoint(Path(chosen.get("out", Options.out)))
        chosen = {**checkpoint["options"], **chosen}
    try:
        train(Options(**chosen), model_changes, checkpoint)
    except KeyboardInterrupt:
        sys.exit("Stopped at once: what was saved before is kept.")


if __name__ == "__main__":
    main()

"""Train a model of moeut.py on text. `python train.py` needs no argument and no network.

    python train.py                                  the Python standard library, on whatever device is there
    python train.py --data=book.txt                  your text: files, folders, patterns
    python train.py --resume                         go on where a run stopped
    python train.py --preset=moeut-44M --data=...    another model, with its recipe: here the paper's run
    python train.py --init_from=runs/a --out=runs/b  begin with the weights and the tokenizer of another run
    torchrun --nproc_per_node=4 train.py             data parallel on four GPUs
    python train.py --bench                          a step and decoding, in turn with the dense Transformer's
    python train.py --compare runs/*                 results of finished runs, over seeds

From top to bottom: options and recipes; tokenizer; text to tokens; checkpoints; training; bench and comparison.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C before there is anything to save: leave at once, without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import codecs
import functools
import glob
import hashlib
import itertools
import json
import math
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch
import torch.distributed as dist

from cvmm import backend
from moeut import PRESETS, MoEUT, MoEUTConfig, preset

# ---------------------------------------------------------------------------------------------------------------------
# Options and recipes: a dataclass is the command line, with the range of every number beside it


class UserError(Exception):
    """What is wrong and what to do about it, in one sentence. `cli` prints it."""


def option(default, help: str, low=-math.inf, below=math.inf, choices=None):
    """A field of a dataclass, and what the command line accepts for it: low <= number < below, or one of choices."""
    make = dict(default_factory=list) if default == [] else dict(default=default)
    return field(**make, metadata=dict(help=help, choices=choices, range=(low, below)))


@dataclass
class Options:
    data: list[str] = option([], "text files, folders or patterns; none: the Python standard library")
    tokenizer: str = option("bpe", "bpe (trained on the text), bytes, or a name known to tiktoken")
    out: str = option("out", "folder of the run")
    resume: bool = option(False, "go on from the last checkpoint in --out, with the options it was started with")
    preset: str = option("tiny", "model and recipe: PRESETS in moeut.py, RECIPES in train.py", choices=PRESETS)
    init_from: str = option("", "begin with the weights and the tokenizer of a run of this program")
    steps: int = option(1100, "optimizer steps", 1)
    tokens_per_step: int = option(2048, "tokens for one optimizer step, over all processes", 1)
    batch_size: int = option(16, "sequences at a time in a process; the rest of a step is accumulated", 1)
    lr: float = option(5e-3, "peak learning rate", 1e-12)
    warmup: int = option(50, "steps of linear warmup", 0)
    hold: float = option(0.6, "share of the steps before the learning rate falls, as a cosine", 0, 1)
    final_lr: float = option(0.02, "where the cosine ends, as a share of the peak", 0)
    weight_decay: float = option(0.1, "of AdamW, on all parameters", 0)
    beta1: float = option(0.7, "of AdamW", 0, 1)
    beta2: float = option(0.99, "of AdamW", 0, 1)
    grad_clip: float = option(1.0, "largest gradient norm", 1e-12)
    seed: int = option(0, "of the initial weights, the order of the batches and dropout", 0, 2**32)
    eval_interval: int = option(220, "steps between evaluations, each with a checkpoint and a sample", 1)
    eval_tokens: int = option(16384, "validation tokens of one evaluation; the last one takes 8 times as many", 1)
    log_interval: int = option(50, "steps between log lines", 1)
    sample_tokens: int = option(120, "length of the samples", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "precision of the matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = option("auto", "torch.compile; auto is yes on CUDA", choices=("auto", "yes", "no"))
    recompute: bool = option(False, "activation checkpointing: less memory, more time")
    wandb: bool = option(False, "also log to Weights & Biases")
    bench: bool = option(False, "time the model in turn with the dense Transformer of its size; train nothing")
    compare: list[str] = option([], "folders of finished runs: print their results side by side")


SMALL = dict(batch_size=8, lr=2e-3, beta1=0.9, steps=2000)
PAPER = dict(steps=100_000, tokens_per_step=65_536, lr=2.5e-4, warmup=4000, hold=0.0, final_lr=0.1, weight_decay=0.01,
             beta1=0.9, beta2=0.999, grad_clip=0.25, eval_interval=1000, eval_tokens=262_144)
RECIPES = {  # of each preset: what differs from the defaults above, which are those of the tiny models
    name: {} if "tiny" in name else SMALL if "small" in name else PAPER for name in PRESETS}
RECIPES["moeut-44M"] = RECIPES["dense-44M"] = PAPER | dict(warmup=0, grad_clip=0.1)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, without the page of usage
        raise UserError(f"{message}; --help lists all options.")


def parse(cls, doc: str, more=None) -> tuple[dict, dict]:
    """What is given on the command line, and only that: fields of the dataclass cls, and of the dataclass more."""
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in (*fields(cls), *(fields(more) if more else ())):
        default = [] if f.default is MISSING else f.default
        kind = dict(type=type(default), metavar=type(default).__name__.upper(), choices=f.metadata.get("choices"))
        kind = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+")}.get(type(default), kind)
        text = f.metadata.get("help", f"the model's, see {more and more.__name__}") + f" ({default})" * bool(default)
        names = sorted({f"--{f.name}", f"--{f.name.replace('_', '-')}"})
        parser.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args())
    mine = {f.name: given.pop(f.name) for f in fields(cls) if f.name in given}
    for f in fields(cls):
        value, (low, below) = mine.get(f.name), f.metadata["range"]
        if value in ("", [""]) or type(value) in (int, float) and not low <= value < below:
            rule = f"at least {low} and below {below}" if type(value) in (int, float) else "not empty"
            raise UserError(f"--{f.name} is {value!r}: it must be {rule}.")
    return mine, given


def cli(main):
    """Run a script. What stops it is said in one sentence, here and nowhere else."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for terminals that know fewer characters than the text has
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        sys.exit(str(e))
    except BrokenPipeError:  # such as `| head`
        os._exit(141)
    except OSError as e:
        sys.exit(f"{e.filename or 'Output'}: {e.strerror or e}.")
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            sys.exit("This does not fit into memory: take a smaller --batch_size, --recompute, or a smaller model.")
        if dist.is_initialized() and "onnection" in str(e):
            sys.exit("Another process of this run has ended, so this one does: --resume goes on from the checkpoint.")
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: a tiktoken.Encoding, made from a `spec` of plain data that a checkpoint can hold

END_OF_TEXT = "<|endoftext|>"
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # bytes are merged within these


def make_spec(name: str, texts, vocab_size: int) -> dict:
    """Of the tokenizer of that name: pattern, tokens in the order of their ids, special tokens. bpe is trained on the
    texts, and has fewer tokens than vocab_size if there is nothing left to merge."""
    if name == "bytes":
        return dict(name=name, pattern=r"(?s:.)", tokens=[bytes([i]) for i in range(256)], special={END_OF_TEXT: 256})
    if name == "bpe":
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, max(vocab_size - 1, 256), pattern=WORDS)
        tokens = [bytes(token) for token, _ in trainer.get_mergeable_ranks()]
        return dict(name=name, pattern=WORDS, tokens=tokens, special={END_OF_TEXT: len(tokens)})
    if name not in (known := tiktoken.list_encoding_names()):
        raise UserError(f"--tokenizer is {name!r}: it must be bpe, bytes, or one of tiktoken's {', '.join(known)}.")
    try:
        e = tiktoken.get_encoding(name)
    except Exception:  # whatever a download may raise
        raise UserError(f"--tokenizer={name} cannot be downloaded: without a network use bpe or bytes.") from None
    tokens = sorted(e._mergeable_ranks, key=e._mergeable_ranks.get)
    return dict(name=name, pattern=e._pat_str, tokens=tokens, special=e._special_tokens)


class Tokenizer:
    def __init__(self, spec: dict):
        self.spec, self.name, self.tokens, self.end = spec, spec["name"], spec["tokens"], spec["special"][END_OF_TEXT]
        encoding = tiktoken.Encoding(
            self.name, pat_str=spec["pattern"], mergeable_ranks={t: i for i, t in enumerate(self.tokens)},
            special_tokens=spec["special"])
        self.n_vocab = encoding.n_vocab
        self.encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())  # text -> ids

    def stream(self, ids):
        """Text of the tokens as they come, in whole characters, up to the end of text."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in itertools.takewhile(lambda i: i != self.end, ids):
            yield decoder.decode(self.tokens[i] if i < len(self.tokens) else b"")  # the others pad the vocabulary
        yield decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens, in memory-mapped files of the user's cache folder that all runs on the same text share


def find_files(patterns: list[str]) -> list[Path]:
    """The files that --data names, each once; in a folder not the hidden ones, nor those of a run of this program."""
    if not patterns:  # the standard library: real code and prose, on every machine
        root, skip = Path(os.__file__).parent, {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    files = set()
    for pattern in patterns:
        found = set()
        for top in map(Path, [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)):
            inside = (p for p in top.rglob("*") if not any(part[0] == "." for part in p.relative_to(top).parts))
            found |= {p for p in inside if not (p.parent / "metrics.jsonl").exists()} if top.is_dir() else {top}
        if not any(map(Path.is_file, found)):
            raise UserError(f"--data: there is no text at {pattern!r}: give a file, a folder with files, or a pattern.")
        files |= {p.resolve() for p in found if p.is_file()}
    return sorted(files)


def texts(path: Path):
    """The text of a file in pieces of whole lines, about a megabyte each. Raises UnicodeDecodeError."""
    with open(path, encoding="utf-8", newline="") as file:
        while lines := file.readlines(1 << 20):
            yield "".join(lines)


def read_documents(files: list[Path]) -> list[tuple[str, int, Path]]:
    """(hash, characters, path) of every file, in the order of the hashes; what is not UTF-8 is left out whole."""
    documents = []
    for path in files:
        digest, n = hashlib.sha256(), 0
        try:
            for text in texts(path):
                digest.update(text.encode())
                n += len(text)
            documents.append((digest.hexdigest(), n, path))
        except UnicodeDecodeError:
            print(f"left out, because it is not UTF-8 text: {path}", flush=True)
    return sorted(documents)


def split(documents):
    """(part, text) of all documents: part 0 for training, 1 for validation, the last tenth of all characters. Where a
    document ends, the text is None."""
    left = int(0.9 * sum(n for _, n, _ in documents))  # characters for training
    for _, _, path in documents:
        for text in texts(path):
            yield 0, text[:left]
            yield 1, text[left:]
            left = max(left - len(text), 0)
        yield int(left == 0), None


def write_aside(path: Path, write):
    """Call write(another path), then rename it to path: whatever happens, there is never half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except RuntimeError:  # of torch.save
        raise UserError(f"{path} cannot be written. Is the disk full? What was saved before is kept.") from None
    finally:
        part.unlink(missing_ok=True)


def load_text(patterns: list[str], name: str, vocab_size: int, tokenizer: Tokenizer | None):
    """Returns the tokenizer, made from its name and the text if it is not given; the tokens for training and for
    validation, where `end` closes every document; what turns nats per token into bits per byte, for both; a hash."""
    files = find_files(patterns)
    documents = functools.cache(lambda: read_documents(files))
    if not tokenizer:
        train = (text for part, text in split(documents()) if part == 0 and text) if name == "bpe" else ()
        tokenizer = Tokenizer(make_spec(name, itertools.islice(train, 200), vocab_size))  # of at most 200 MB
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32)
    key = repr([tokenizer.spec, [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeut"
    path = cache / hashlib.sha256(key.encode()).hexdigest()[:24]

    def write(part: Path):  # a header of 64 bytes: tokens of both parts, bytes of both, hash; then the tokens
        count, shown = np.zeros((2, 2), np.int64), time.time()
        with open(part, "wb") as file:
            file.write(bytes(64))
            for which, text in split(documents()):
                ids = [tokenizer.end] if text is None else tokenizer.encode(text)
                file.write(np.asarray(ids, dtype).tobytes())
                count[:, which] += len(ids), len((text or "").encode())
                if time.time() - shown > 2:
                    shown = time.time()
                    print(f"tokenizing: {count[1].sum() / 1e6:.0f} MB", flush=True)
            file.seek(0)
            file.write(count.tobytes() + hashlib.sha256("".join(d for d, _, _ in documents()).encode()).digest())

    for _ in range(2):
        try:
            n_train, n_val, *n_bytes, _, _, _, _ = header = np.fromfile(path, np.int64, 8).tolist()
            tokens = np.memmap(path, dtype, "r", 64, (n_train + n_val,))
            break
        except (OSError, ValueError):  # not there, or damaged
            write_aside(path, write)
    bits = [n / max(b, 1) / math.log(2) for n, b in zip((n_train, n_val), n_bytes, strict=True)]
    return tokenizer, tokens[:n_train], tokens[n_train:], bits, header[4:]


@functools.lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, n: int, n_offsets: int) -> tuple[np.ndarray, int]:
    """The order of an epoch's n windows, and where the first of them begins."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), int(rng.integers(n_offsets))


def windows(data: np.ndarray, T: int, numbers, seed: int) -> list[np.ndarray]:
    """The training windows of these numbers, T + 1 tokens each. Every epoch cuts the text anew and visits all windows
    once. What a number stands for does not depend on batch size, processes or interruptions."""
    n, found = max((len(data) - T - 1) // T, 1), []
    for epoch, i in (divmod(number, n) for number in numbers):
        order, offset = shuffled(seed, epoch, n, min(T, len(data) - n * T))
        found.append(data[offset + order[i] * T :][: T + 1])
    return found


def to_device(windows: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, T], one token apart."""
    batch = torch.from_numpy(np.stack(windows).astype(np.int64))
    batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file of plain data and tensors, with all that sampling and --resume need


def read_checkpoint(path: Path) -> dict:
    """What is in the file, or in last.pt of the folder."""
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"There is no checkpoint at {path}: `python train.py` makes one, --out says where.")
    try:
        with torch.serialization.safe_globals([(dict, "framework.data_structures.dotdict.DotDict")]):  # of the authors
            return dict(torch.load(path, map_location="cpu", weights_only=True).items())
    except Exception:  # whatever a foreign file may raise
        raise UserError(f"{path} is not a checkpoint, or it is damaged.") from None


def load_model(path: Path) -> tuple[MoEUT, Tokenizer, dict]:
    """The model and the tokenizer of a checkpoint, and all that it holds."""
    stored = read_checkpoint(path)
    try:
        model = MoEUT(MoEUTConfig(**stored["config"]))
        model.load_state_dict(stored["model"])
        return model, Tokenizer(stored["tokenizer"]), stored
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{path} does not hold a model that this program has saved.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training

PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71, "L4": 121, "T4": 65}  # TFLOP/s


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda", "mps"):
            return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise UserError(f"There is no device {name!r} on this machine: --device=cpu always works.")


def learning_rate(step: int, o: Options) -> float:
    """Linear warmup to the peak, which is held for a while, then a cosine to final_lr of it."""
    begin = max(o.warmup, o.hold * o.steps)
    progress = min(max(step - begin, 0) / max(o.steps - begin, 1), 1)
    cosine = o.final_lr + (1 - o.final_lr) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return o.lr * min((step + 1) / max(o.warmup, 1), cosine)


@torch.no_grad()
def evaluate(model: MoEUT, data: np.ndarray, n_tokens: int, batch_size: int, autocast) -> float:
    """Mean cross entropy in nats per token on windows spread evenly over `data`, always the same ones."""
    T, device, total = model.config.block_size, model.head.weight.device, 0.0
    starts = np.linspace(0, len(data) - T - 1, max(min(n_tokens, len(data) - 1) // T, 1)).astype(np.int64)
    model.eval()
    for i in range(0, len(starts), batch_size):
        x, y = to_device([data[s : s + T + 1] for s in starts[i : i + batch_size]], device)
        with autocast:
            total += model(x, y).cross_entropy.item() * len(x)
    model.train()
    return total / len(starts)


def peak_memory(device: torch.device) -> float:
    """The most MiB held so far: on the GPU, or by the whole process; nan where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def draw(metrics: list[dict], path: Path):
    """A picture of the loss curves, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key in ("loss", "val_loss"):
        axes.plot([m["step"] for m in metrics if key in m], [m[key] for m in metrics if key in m], label=key)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    write_aside(path, lambda part: figure.savefig(part, format="png"))


class Trainer:
    """A model with what its training steps need; `run` is the model, possibly compiled and data-parallel."""

    def __init__(self, model: MoEUT, o: Options, device: torch.device, world: int = 1):
        self.model, self.grad_clip, model.recompute = model.to(device).train(), o.grad_clip, o.recompute
        newer = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        best = "float32" if device.type == "cpu" else "bfloat16" if newer else "float16"  # what the device is fast in
        self.dtype = getattr(torch, best if o.dtype == "auto" else o.dtype)
        self.autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        betas, decay = (o.beta1, o.beta2), o.weight_decay
        self.optimizer = torch.optim.AdamW(model.parameters(), o.lr, betas, weight_decay=decay, fused=True)
        self.compiled = o.compile == "yes" or o.compile == "auto" and device.type == "cuda"
        self.run = torch.compile(model) if self.compiled else model
        self.run = torch.nn.parallel.DistributedDataParallel(self.run) if world > 1 else self.run

    def step(self, batches: list, lr: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step on batches whose gradients add up: cross entropy, regulariser and gradient norm. It is
        skipped if the norm is not finite."""
        cross_entropy = reg = 0
        for i, (x, y) in enumerate(batches):
            self.run.require_backward_grad_sync = i == len(batches) - 1  # processes exchange gradients once a step
            with self.autocast:
                out = self.run(x, y)
            self.scaler.scale(out.loss / len(batches)).backward()
            cross_entropy = cross_entropy + out.cross_entropy.detach() / len(batches)
            reg = reg + out.reg.detach() / len(batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip).item()
        self.optimizer.param_groups[0]["lr"] = lr
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return cross_entropy, reg, norm


def train(given: dict, changes: dict):
    # One process trains on one device. torchrun starts more, which share the sequences of every step.
    rank, world, device_name = 0, 1, given.get("device", "auto")
    if dist.is_torchelastic_launched():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        on_gpu = torch.cuda.is_available() and device_name != "cpu"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        device_name = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu and device_name == "auto" else device_name
    device, say = pick_device(device_name), functools.partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    torch.set_float32_matmul_precision("high")  # TF32 where there is nothing better
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow on a CPU, and nobody misses them

    # Options: of the command line, else of the run that goes on, else of the preset's recipe
    out, model, tokenizer, resumed = Path(given.get("out", Options.out)), None, None, {}
    for how in ("resume", "init_from"):
        if given.get(how):
            fixed = ("preset", "tokenizer") + ("init_from", "seed", "tokens_per_step") * (how == "resume")
            for name in (*changes, *(name for name in fixed if name in given)):
                raise UserError(f"--{name} cannot be given with --{how}: the checkpoint says it.")
            model, tokenizer, stored = load_model(out if how == "resume" else Path(given[how]))
            resumed = stored if how == "resume" else {}
    if not resumed and (out / "last.pt").exists():
        raise UserError(f"{out} holds a run already: --resume goes on with it, another --out begins a new one.")
    o = Options(**RECIPES[given.get("preset", Options.preset)] | resumed.get("options", {}) | given)
    o.data = [os.path.abspath(pattern) for pattern in o.data]
    try:
        config = model.config if model else preset(o.preset, **changes)
    except ValueError as e:
        raise UserError(str(e)) from None
    T, (sequences, rest) = config.block_size, divmod(o.tokens_per_step, config.block_size * world)  # of each process
    batch_size = min(o.batch_size, sequences)
    if rest or not sequences or sequences % batch_size:
        raise UserError(
            f"--tokens_per_step is {o.tokens_per_step}: it must be a multiple of block_size x batch_size x processes = "
            f"{T} x {o.batch_size} x {world} = {T * o.batch_size * world}.")
    if resumed and resumed["step"] >= o.steps:
        raise UserError(f"The run in {out} has done its {resumed['step']} steps: --steps=N with a larger N goes on.")

    # Text: rank 0 writes the tokens, the others find them
    if rank:
        dist.barrier()
    tokenizer, data, val_data, bits, text_hash = load_text(o.data, o.tokenizer, config.vocab_size, tokenizer)
    if world > 1 and rank == 0:
        dist.barrier()
    if resumed and resumed["text_hash"] != text_hash:
        raise UserError("The text is not what it was when the run began: --resume needs it, --init_from does not.")
    if min(len(data), len(val_data)) <= T:
        raise UserError(
            f"The text has {len(data)} tokens for training and {len(val_data)} for validation, a sequence {T + 1}: "
            "give more text, or a smaller --block_size.")

    # Model: with the tokenizer's vocabulary, or with a larger one that was asked for
    if not model:
        n, wanted = tokenizer.n_vocab, config.vocab_size
        if n > wanted and "vocab_size" in changes:
            raise UserError(f"--vocab_size is {wanted}, but the tokenizer {tokenizer.name} has {n} tokens.")
        if n < wanted and tokenizer.name == "bpe":
            say(f"vocabulary: {n} tokens instead of {wanted}, because the text has no more to merge")
        padded = "vocab_size" in changes and tokenizer.name != "bpe"
        torch.manual_seed(o.seed)
        model = MoEUT(replace(config, vocab_size=wanted if padded else n))
    trainer, config = Trainer(model, o, device, world), model.config
    if resumed:
        trainer.optimizer.load_state_dict(resumed["optimizer"])
        if trainer.scaler.is_enabled() and resumed["scaler"]:
            trainer.scaler.load_state_dict(resumed["scaler"])
    step, seconds, best = (resumed.get(k, v) for k, v in dict(step=0, seconds=0.0, best=math.inf).items())
    metrics, first_step, resumed, stored = resumed.get("metrics", []), step, None, None  # the memory is needed

    say("model:", *(f"--{k}={v}" for k, v in asdict(config).items()))
    say("options:", *(f"--{k}={v}" for k, v in asdict(o).items() if v not in ("", [], False)))
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.macs_per_token():,} MACs per token; "
        f"{len(data) / 1e6:.2f}M tokens to train on, {len(val_data) / 1e6:.2f}M for validation; {world} x {device}, "
        f"{str(trainer.dtype)[6:]}, {'' if trainer.compiled else 'not '}compiled, experts by {backend(device)}")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((world * 1e12 * tflops for name, tflops in PEAKS.items() if name in gpu), None)
    flops = 6 * (config.macs_per_token(T // 2) + config.n_embd * config.vocab_size)  # of a token, attention halved
    if rank == 0:
        for left in out.glob("*.part"):
            left.unlink()
        lines = "".join(json.dumps(m) + "\n" for m in metrics)
        write_aside(out / "metrics.jsonl", lambda part: part.write_text(lines))
        if o.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs a package: pip install wandb") from None
            wandb.init(project="moeut", name=out.name, config=asdict(o) | asdict(config))

    def record(**numbers):
        metrics.append(dict(step=step, seconds=round(seconds, 1), **numbers))
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics[-1]) + "\n")
        if o.wandb:
            wandb.log(numbers, step=step)

    def save(*names: str):
        state = dict(
            step=step, seconds=seconds, best=best, metrics=metrics, text_hash=text_hash, options=asdict(o),
            config=asdict(config), tokenizer=tokenizer.spec, model=model.state_dict(),
            optimizer=trainer.optimizer.state_dict(), scaler=trainer.scaler.state_dict())
        for name in names:
            write_aside(out / name, lambda part: torch.save(state, part))

    # Ctrl-C and SIGTERM end the loop after the step it is in. A second Ctrl-C leaves at once.
    signals = []

    def on_signal(number, _):
        if number == signal.SIGINT and number in signals:
            os._exit(130)
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    clock, logged, skipped, stopping = time.time(), (time.time(), step), 0, False
    while step < o.steps and not stopping:
        torch.manual_seed(o.seed + step * world + rank)  # of dropout: a resumed run goes on alike, processes differ
        first, batches, lr = (step * world + rank) * sequences, [], learning_rate(step, o)
        for i in range(first, first + sequences, batch_size):
            batches.append(to_device(windows(data, T, range(i, i + batch_size), o.seed), device))
        loss, reg, norm = trainer.step(batches, lr)
        step += 1
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped == 10:
            raise UserError(f"The gradient was not finite in ten steps in a row, up to {step}: try a smaller --lr. "
                            "What was saved before is kept.")
        stop = torch.tensor(float(len(signals)))
        if world > 1:
            dist.all_reduce(stop)  # all processes leave the loop after the same step
        done, stopping = step == o.steps, stop.item() > 0
        seconds, clock = seconds + time.time() - clock, time.time()

        if step % o.log_interval == 0 or step == first_step + 1 or done:
            if world > 1:
                dist.all_reduce(loss)
            rate = (step - logged[1]) * o.tokens_per_step / (time.time() - logged[0])
            loss, reg, left = loss.item() / world, reg.item(), (o.steps - step) * o.tokens_per_step / rate
            say(f"step {step}/{o.steps}: loss {loss:.3f}, {loss * bits[0]:.3f} bits/byte, reg {reg:.3f}, lr {lr:.1e}, "
                f"grad {norm:.2f}, {rate:,.0f} tokens/s, {left // 60:.0f}m{left % 60:02.0f}s to go"
                + f", {rate * flops / (peak or 1):.1%} MFU" * bool(peak) + f", {skipped} steps skipped" * bool(skipped))
            if rank == 0:
                record(loss=loss, reg=reg, grad=norm, tokens_per_second=rate, peak_mib=peak_memory(device))
            logged = time.time(), step

        if rank == 0 and (step % o.eval_interval == 0 or done or stopping):
            val, files = math.nan if skipped else math.inf, ["last.pt"]
            if not stopping:
                val = evaluate(model, val_data, o.eval_tokens * (8 if done else 1), batch_size, trainer.autocast)
                say(f"step {step}/{o.steps}: validation loss {val:.4f}, {val * bits[1]:.4f} bits/byte")
                record(val_loss=val, val_bits=val * bits[1])
            if val < best:
                best, files = val, ["last.pt", "best.pt"]
            if math.isnan(val):
                say("not saved, because the loss is not a number")
            else:
                save(*files)
                draw(metrics, out / "loss.png")
                if o.sample_tokens and not stopping:
                    ids = model.eval().generate(torch.tensor([[tokenizer.end]], device=device), o.sample_tokens, 0.8)
                    say("-" * 60, "".join(tokenizer.stream(i.item() for i in ids)), "-" * 60, sep="\n")
                    model.train()
            logged, clock = (logged[0] + time.time() - clock, logged[1]), time.time()
        if world > 1:
            dist.barrier()
    if stopping and rank == 0:
        raise UserError(f"Stopped after step {step}, saved in {out}: `python train.py --resume --out={out}` goes on.")
    say(f"done in {seconds:.0f} s of training, saved in {out}; now `python sample.py --out={out}`")


# ---------------------------------------------------------------------------------------------------------------------
# The bench, and finished runs side by side


def bench(given: dict, changes: dict, rounds: int = 9):
    """Time MoEUT and the dense Transformer of the same size in turn, and print the ratios."""
    name, device = given.get("preset", "small"), pick_device(given.get("device", "auto"))
    names = name, "dense-" + name.split("-")[-1]
    if changes or names[0] == names[1] or names[1] not in PRESETS:
        raise UserError("--bench compares a MoEUT with the dense Transformer of its size: give only a --preset.")
    o, table, steps, decoders = Options(**RECIPES[name] | given), {"parameters": [], "MACs per token": []}, [], []
    for name in names:
        model = MoEUT(preset(name))
        table["parameters"].append(sum(p.numel() for p in model.parameters()))
        table["MACs per token"].append(model.config.macs_per_token())
        x, trainer = torch.zeros(o.batch_size, model.config.block_size, dtype=int), Trainer(model, o, device)
        x = x.random_(model.config.vocab_size).to(device)
        steps.append(functools.partial(trainer.step, [(x, x)], 1e-3))
        tokens = MoEUT(preset(name, block_size=2048)).to(device).eval().generate(x.new_zeros(1, 1024), 2000)
        decoders.append(functools.partial(next, tokens))
    for what, pair, repeats in ((f"step of {x.numel()} tokens, ms", steps, 1), ("decoding, ms", decoders, 25)):
        times = np.zeros((rounds + 2, 2))
        for i, j in np.ndindex(times.shape):  # in turn
            start = time.perf_counter()
            for _ in range(repeats):
                pair[j]()[0].item()
            times[i, j] = (time.perf_counter() - start) * 1000 / repeats
        table[what] = np.median(times[2:], axis=0).tolist()
    print(f"{device}, {torch.get_num_threads()} threads; medians of {rounds} rounds; decoding after 1024 tokens\n"
          f"{'':24} {names[0]:>14} {names[1]:>14}  ratio")
    for what, (a, b) in table.items():
        print(f"{what:24} {a:14,.{2 * (a < 1e4)}f} {b:14,.{2 * (a < 1e4)}f} {a / b:6.2f}")


def compare(folders: list[str]):
    """A line for each model: bits per byte of the last evaluation over seeds, training time, memory."""
    groups, common = {}, None
    for folder in folders:
        run = read_checkpoint(Path(folder))
        try:
            o, c, metrics = Options(**run["options"]), MoEUTConfig(**run["config"]), run["metrics"]
            memory = max(m.get("peak_mib", 0) for m in metrics)
            result = [m["val_bits"] for m in metrics if "val_bits" in m][-1], run["seconds"], memory
        except (KeyError, TypeError, IndexError):
            raise UserError(f"The run in {folder} has no evaluation yet: let it go on with --resume.") from None
        conditions = dict(data=o.data, tokens_per_step=o.tokens_per_step, step=run["step"], vocab_size=c.vocab_size)
        for k, v in conditions.items():
            if v != (common := common or conditions)[k]:
                raise UserError(f"These cannot be compared: {k} is {common[k]} in {folders[0]} and {v} in {folder}.")
        original = preset(o.preset, vocab_size=c.vocab_size)
        name = " ".join([o.preset, *(f"{k}={v}" for k, v in asdict(c).items() if v != getattr(original, k))])
        groups.setdefault((name, c.macs_per_token()), []).append(result)
    print(f"{common['step']} steps of {common['tokens_per_step']} tokens; bits per byte: mean, lowest, highest\n"
          f"{'model':40} runs   MACs/token bits/byte     low    high  seconds    MiB")
    for (name, macs), runs in sorted(groups.items(), key=lambda group: np.mean(group[1], axis=0)[0]):
        (bits, _, _), (low, _, _), (high, _, _) = (f(runs, axis=0) for f in (np.mean, np.min, np.max))
        _, seconds, memory = np.median(runs, axis=0)
        print(f"{name:40} {len(runs):4} {macs:12,} {bits:9.4f} {low:7.4f} {high:7.4f} {seconds:8.0f} {memory:6.0f}")


def main():
    given, changes = parse(Options, __doc__, MoEUTConfig)
    if given.get("bench"):
        bench(given, changes)
    elif "compare" in given:
        compare(given["compare"])
    else:
        train(given, changes)


if __name__ == "__main__":
    cli(main)

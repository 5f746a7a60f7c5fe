"""Train a model of moeut.py on text. `python train.py` needs no argument and no network.

    python train.py                                  the Python standard library, on whatever device is there
    python train.py --data=book.txt                  your text: files, folders, patterns
    python train.py --resume                         go on where a run stopped
    python train.py --preset=moeut-44M --data=...    another model, with its recipe: here the paper's run
    python train.py --init_from=runs/a --out=runs/b  begin with the weights and the tokenizer of another run
    torchrun --nproc_per_node=4 train.py             data parallel on four GPUs

From top to bottom: options and recipes; checkpoints; training. text.py makes tokens of the text, bench.py compares.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import cvmm
from moeut import PRESETS, MoEUT, MoEUTConfig
from text import WRITTEN, Tokenizer, aside, batch, load_text, window_starts

# Options and recipes: a dataclass is the command line, with the range of every number beside it ----------------------


def option(default, help: str, low=-math.inf, below=math.inf, choices=None, read=os.path.expanduser):
    """A field of a dataclass, and what the command line accepts for it: low <= number < below, or one of choices. Text
    is read as a path is, because shells leave a ~ after = as it stands."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, below=below, read=read))


@dataclass
class Options:
    data: tuple = option((), "text files, folders or patterns; none: the Python standard library")
    tokenizer: str = option("bpe", "bpe (trained on the text), bytes, or a name known to tiktoken")
    out: str = option("out", "folder of the run")
    resume: bool = option(False, "go on from the last checkpoint in --out; --steps, --lr, ... may be new")
    preset: str = option("tiny", "model, and recipe instead of these defaults: PRESETS, RECIPES", choices=PRESETS)
    init_from: str = option("", "begin with another run's weights and tokenizer; --n_layer, --dropout, ... may differ")
    steps: int = option(700, "optimizer steps", 1)
    tokens_per_step: int = option(2048, "tokens for one optimizer step, over all processes", 1)
    batch_size: int = option(16, "sequences at a time in a process; the rest of a step is accumulated", 1)
    lr: float = option(1e-2, "peak learning rate", 1e-12)
    warmup: int = option(20, "steps of linear warmup", 0)
    hold: float = option(0.6, "share of the steps before the learning rate falls, as a cosine", 0, 1)
    final_lr: float = option(0.02, "where the cosine ends, as a share of the peak", 0)
    weight_decay: float = option(0.1, "of AdamW, on all parameters", 0)
    beta1: float = option(0.7, "of AdamW", 0, 1)
    beta2: float = option(0.99, "of AdamW", 0, 1)
    grad_clip: float = option(1.0, "largest gradient norm", 1e-12)
    seed: int = option(0, "of the initial weights, the order of the batches and dropout", 0, 2**32)
    eval_interval: int = option(175, "steps between evaluations, each with a checkpoint and a sample", 1)
    eval_tokens: int = option(16384, "validation tokens of one evaluation; the last one takes 8 times as many", 1)
    log_interval: int = option(50, "steps between log lines", 1)
    sample_tokens: int = option(120, "length of the samples", 0)
    device: str = option("auto", "auto is cuda, or else cpu; also cuda:1, mps")
    dtype: str = option("auto", "precision of the matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = option("auto", "torch.compile; auto is yes on CUDA with Triton", choices=("auto", "yes", "no"))
    recompute: bool = option(False, "activation checkpointing: less memory, more time, layers not compiled")
    wandb: bool = option(False, "also log to Weights & Biases")


SMALL = dict(batch_size=8, lr=2e-3, warmup=50, beta1=0.9, steps=2000, eval_interval=250)
PAPER = dict(steps=100_000, tokens_per_step=65_536, lr=2.5e-4, warmup=4000, hold=0.0, final_lr=0.1, weight_decay=0.01,
             beta1=0.9, beta2=0.999, grad_clip=0.25, eval_interval=1000, eval_tokens=262_144)
RECIPES = {  # of each preset: what differs from the defaults above, which are for the tiny models and yours
    name: SMALL if "small" in name else PAPER if name[-1] in "MB" else {} for name in PRESETS}
RECIPES["moeut-44M"] = RECIPES["dense-44M"] = PAPER | dict(warmup=0, grad_clip=0.1)


def parse(doc: str, *classes) -> list[dict]:
    """What is given on the command line, and only that: for each of the dataclasses, its fields."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option=value ...]", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"{message}; --help lists all options.")  # without the page of usage
    for f in [f for c in classes for f in fields(c)]:
        kind, about = type(f.default), {"help": "see MoEUTConfig in moeut.py", **f.metadata}
        choices, read = about.get("choices"), about.get("read", str) if kind in (str, tuple) else kind
        how = dict(type=read, choices=choices, metavar=None if choices else kind.__name__.upper())
        how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="+", type=read)}.get(kind, how)
        parser.add_argument(f"--{f.name}", help=about["help"] + f" ({f.default})" * bool(f.default), **how)
    given = vars(parser.parse_args())
    for f in fields(classes[0]):
        value, low, below = given.get(f.name), f.metadata["low"], f.metadata["below"]
        if "" in (value if type(value) is list else [value]):
            sys.exit(f"--{f.name} is empty.")
        if type(value) in (int, float) and not low <= value < below:
            sys.exit(f"--{f.name} is {value}: it must be at least {low} and below {below}.")
    return [{f.name: given[f.name] for f in fields(c) if f.name in given} for c in classes]


def cli(main):
    """Run a script. What stops it is said in one sentence: by sys.exit where it is found, or here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that aside() removes its half of a file
    for stream in (sys.stdout, sys.stderr):  # for terminals that know fewer characters than the text has
        if hasattr(stream, "reconfigure"):  # that of a notebook has not
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:  # there is nothing to save; and the interpreter, in its shutdown, might abort
        os._exit(130)
    except BrokenPipeError:  # such as `| head`
        os._exit(141)
    except OSError as e:
        sys.exit(f"{e.filename or 'Output'}: {e.strerror or e}.")
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            sys.exit("This does not fit into memory: take a smaller --batch_size, --recompute, or a smaller model.")
        if dist.is_initialized() and "onnection" in str(e):
            sys.exit("Another process of this run has ended, so this one does: --resume goes on from what was saved.")
        raise


# Checkpoints: one file of plain data and tensors, with all that sampling and --resume need ---------------------------


def read_checkpoint(path: Path) -> dict:
    """What is in the file, or in last.pt of the folder."""
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        sys.exit(f"There is no checkpoint at {path}: `python train.py` makes one, --out says where.")
    try:
        with torch.serialization.safe_globals([(dict, "framework.data_structures.dotdict.DotDict")]):  # of the authors
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:  # such as one that may not be read: not the file's fault
        raise
    except Exception:  # whatever a foreign file may raise
        sys.exit(f"{path} is not a checkpoint, or it is damaged.")


def load_model(path: Path, stored: dict | None = None, **changes) -> tuple[MoEUT, Tokenizer, dict]:
    """The model of a checkpoint, or of what was read from it, its config changed where weights allow it; its tokenizer;
    all that it holds."""
    stored = stored or read_checkpoint(path)
    try:
        Options(**stored["options"])  # or it is of another program, or of another version of this one
        model = MoEUT(MoEUTConfig(**stored["config"] | changes))
        model.load_state_dict(stored["model"])
        return model, Tokenizer(stored["tokenizer"]), stored
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        sys.exit(f"{path} does not hold a model that fits ({str(e).splitlines()[-1].strip()}).")  # the last of reasons


# Training ------------------------------------------------------------------------------------------------------------

PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71, "L4": 121, "T4": 65}  # TFLOP/s


def macs_per_token(c: MoEUTConfig, context: int) -> int:
    """Multiply-accumulates of the forward pass of a token that attends to `context` positions, without embedding and
    lm_head: the paper's formula, which does not halve attention for causality."""
    C, H, D, A, moe = c.n_embd, c.n_head, c.head_size, c.n_att_expert, c.attention == "moe"
    J, gates = (c.att_top_k, 2 * A) if moe and A > 1 else (1, int(moe))
    attention = 2 * H * D * context + 2 * (1 + J) * C * H * D + C * H * gates
    ffn = 2 * c.top_k * C * c.expert_size + c.n_expert * C if c.ffn == "moe" else 2 * C * c.ffn_size
    return c.n_layer * (attention + ffn)


def pick_device(name: str) -> torch.device:
    try:
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun says which
        return torch.zeros(1, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError, ImportError) as e:
        sys.exit(f"--device={name} cannot be used ({str(e).splitlines()[0]:.80}): --device=cpu always works.")


def learning_rate(step: int, o: Options) -> float:
    """Linear warmup to the peak, which is held for a while, then a cosine to final_lr of it."""
    begin = max(o.warmup, o.hold * o.steps)
    progress = min(max(step - begin, 0) / max(o.steps - begin, 1), 1)
    cosine = o.final_lr + (1 - o.final_lr) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return o.lr * min((step + 1) / max(o.warmup, 1), cosine)


@torch.no_grad()
def evaluate(model: MoEUT, data: np.ndarray, n_tokens: int, batch_size: int, autocast) -> float:
    """Mean cross entropy in nats per token on windows spread evenly over `data`, always the same ones."""
    T, device, total = model.config.block_size, model.lm_head.weight.device, 0.0
    starts = np.linspace(0, len(data) - T - 1, max(min(n_tokens, len(data) - 1) // T, 1)).astype(np.int64)
    model.eval()
    for some in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        with autocast:
            total += model(*batch(data, some, T, device)).cross_entropy.item() * len(some)
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
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for key in ("loss", "val_loss"):
        axes.plot([m["step"] for m in metrics if key in m], [m[key] for m in metrics if key in m], label=key)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    with aside(path) as file:
        axes.figure.savefig(file, format="png")


class Trainer:
    """A model with what its training steps need; `run` is the model, possibly compiled and data-parallel."""

    def __init__(self, model: MoEUT, o: Options, device: torch.device, world: int = 1):
        self.model, self.grad_clip, model.recompute = model.to(device), o.grad_clip, o.recompute
        newer = device.type == "cuda" and cvmm.capability(device) >= (8, 0)  # Ampere
        best = "float32" if device.type == "cpu" else "bfloat16" if newer else "float16"  # what the device is fast in
        self.dtype = getattr(torch, best if o.dtype == "auto" else o.dtype)
        self.autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.optimizer = torch.optim.AdamW(  # its learning rate is set by each step
            model.parameters(), betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)
        self.compiled = o.compile == "yes" or o.compile == "auto" and cvmm.backend(device) == "Triton"
        self.run = torch.compile(model) if self.compiled else model
        if world > 1:
            self.run = torch.nn.parallel.DistributedDataParallel(self.run)

    def step(self, batches: list, lr: float) -> tuple[float, float, float]:
        """Step by the mean gradient of the batches, unless its norm is not finite. Returns cross entropy, reg, norm."""
        self.model.train()
        losses = 0.0
        for i, (x, y) in enumerate(batches):
            self.run.require_backward_grad_sync = i == len(batches) - 1  # processes exchange gradients once a step
            with self.autocast:
                out = self.run(x, y)
            self.scaler.scale(out.loss / len(batches)).backward()
            losses += torch.stack((out.cross_entropy, out.reg)).detach() / len(batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip).item()
        self.optimizer.param_groups[0]["lr"] = lr
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return *losses.tolist(), norm


def main():
    given, changes = parse(__doc__, Options, MoEUTConfig)

    # One process trains on one device. torchrun starts more, which share the sequences of every step.
    rank, world = 0, 1
    if dist.is_torchelastic_launched():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # nccl for gradients on GPUs only
        dist.init_process_group(backends, timeout=timedelta(days=1))  # which a long text may take
        rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # one process speaks
    torch.set_float32_matmul_precision("high")  # TF32 where there is nothing better
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow on a CPU, and nobody misses them

    # Options: of the command line, else of the resumed run, else of the preset's recipe
    out, resume = Path(given.setdefault("out", Options.out)), given.get("resume", False)
    model, tokenizer, stored = None, None, {}
    if resume or "init_from" in given:
        fixed = {"preset", "tokenizer"}
        fixed |= {"init_from", "seed", "tokens_per_step", "eval_tokens", *changes} if resume else set()
        if wrong := min(fixed & {*given, *changes}, default=""):
            sys.exit(f"--{wrong} cannot be given with --{'resume' if resume else 'init_from'}: the checkpoint says it.")
        model, tokenizer, stored = load_model(out / "last.pt" if resume else Path(given["init_from"]), **changes)
        given |= {k: v for k, v in stored["options"].items() if k in fixed}
    if not resume and any(out.glob("*.pt")):
        sys.exit(f"{out} holds a run already: --resume goes on with it, another --out begins a new one.")
    usual = stored["options"] if resume else RECIPES.get(given.get("preset", Options.preset), {})
    o = Options(**usual | given)
    o.data, device = tuple(map(os.path.abspath, o.data)), pick_device(o.device)
    try:
        config = model.config if model else replace(PRESETS[o.preset], **changes)
    except ValueError as e:
        sys.exit(str(e))
    T = config.block_size
    sequences, rest = divmod(o.tokens_per_step, T * world)  # of a step, for each process
    batch_size = min(o.batch_size, sequences)
    if rest or sequences % batch_size:
        sys.exit(f"--tokens_per_step is {o.tokens_per_step}: it must be block_size x processes = {T * world} times "
                 f"a number up to batch_size = {o.batch_size}, or times a multiple of that.")
    if resume and not stored.get("optimizer"):
        sys.exit(f"{out} does not hold an optimizer: --init_from={out} takes the weights alone.")
    if resume and stored["step"] >= o.steps:
        sys.exit(f"The run in {out} has done its {stored['step']} steps: --steps=N with a larger N goes on.")

    for name in WRITTEN:
        for left in out.glob(f"{name}.*.part"):  # of a run that was killed
            left.unlink(missing_ok=True)

    # Text: rank 0 writes the tokens, and tells the others its tokenizer once these are there
    if rank > 0:
        dist.broadcast_object_list(spec := [None])
        tokenizer = Tokenizer(spec[0])
    tokenizer, data, val_data, bits, text_hash = load_text(o.data, o.tokenizer, config.vocab_size, tokenizer)
    if rank == 0 and world > 1:
        dist.broadcast_object_list([tokenizer.spec])
    if resume and stored["text_hash"] != text_hash:
        sys.exit("The text is not what it was when the run began: --resume needs it, --init_from does not.")
    if min(len(data), len(val_data)) <= T:
        sys.exit(f"The text has {len(data)} tokens for training and {len(val_data)} for validation, a sequence {T + 1}:"
                 " give more text, or a smaller --block_size.")

    out.mkdir(parents=True, exist_ok=True)  # fails now, not at the first checkpoint

    # Model: with the tokenizer's vocabulary, or with a larger one that was asked for
    if not model:
        n, asked = tokenizer.n_vocab, changes.get("vocab_size", tokenizer.n_vocab)
        if asked < n:
            sys.exit(f"--vocab_size is {asked}, but the tokenizer {tokenizer.name} has {n} tokens.")
        if n < config.vocab_size and tokenizer.name == "bpe":
            print(f"vocabulary: {n} tokens instead of {config.vocab_size}: the text has no more to merge")
        torch.manual_seed(o.seed)
        model = MoEUT(replace(config, vocab_size=n if tokenizer.name == "bpe" else asked))
    trainer, config = Trainer(model, o, device, world), model.config
    run = dict(step=0, seconds=0.0, best=math.inf, metrics=[])
    if resume:
        run = {k: stored[k] for k in run}
        trainer.optimizer.load_state_dict(stored["optimizer"])
        trainer.optimizer.param_groups[0] |= trainer.optimizer.defaults  # the numbers of now
        if stored["scaler"]:
            trainer.scaler.load_state_dict(stored["scaler"])
    run |= dict(text_hash=text_hash, options=asdict(o), config=asdict(config), tokenizer=tokenizer.spec)
    first_step, stored = run["step"] + 1, None  # frees its memory

    print("model:", *(f"{k}={v}" for k, v in asdict(config).items()))
    print("options:", *(f"{k}={v}" for k, v in asdict(o).items()))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {macs_per_token(config, T):,} MACs per token; "
          f"{len(data) / 1e6:.2f}M tokens to train on, {len(val_data) / 1e6:.2f}M for validation; {world} x {device}, "
          f"{str(trainer.dtype)[6:]}, {'' if trainer.compiled else 'not '}compiled, experts by {cvmm.backend(device)}")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((world * 1e12 * PEAKS[part] for part in gpu.replace("-", " ").split() if part in PEAKS), None)
    flops = 6 * (macs_per_token(config, T // 2) + config.n_embd * config.vocab_size)  # causal: T // 2
    if rank == 0 and o.wandb:
        try:
            import wandb
        except ImportError:
            sys.exit("--wandb needs a package: pip install wandb")
        wandb.init(project="moeut", name=out.name, config=asdict(o) | asdict(config))

    def log(**numbers):
        """On the screen, in metrics.jsonl, in the checkpoint."""
        words = (f"{k} {v:,.0f}" if v > 999 else f"{k} {v:.4g}" for k, v in numbers.items())
        try:
            print(f"step {step}/{o.steps}:", ", ".join(words))
        except BrokenPipeError:  # Ctrl-C ended `| tee` too: save what there is, and leave
            signals.append(0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        run["metrics"].append(dict(step=step, seconds=round(run["seconds"], 1), **finite))
        with aside(out / "metrics.jsonl") as file:
            file.writelines(json.dumps(m).encode() + b"\n" for m in run["metrics"])
        if o.wandb:
            wandb.log(numbers, step=step)

    # Ctrl-C and SIGTERM end the loop after the step it is in. A second Ctrl-C leaves at once, except under torchrun:
    # there each process gets a single Ctrl-C twice, from the terminal and from torchrun.
    signals = []

    def on_signal(number, _):
        if number == signal.SIGINT and number in signals and world == 1:
            os._exit(130)
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    logged, skipped, in_a_row = (run["step"], run["seconds"]), 0, 0
    for step in range(first_step, o.steps + 1):
        started = time.perf_counter()
        torch.manual_seed(o.seed + (step - 1) * world + rank)  # for dropout: resumed runs repeat it, processes differ
        lr, first = learning_rate(step - 1, o), ((step - 1) * world + rank) * sequences
        starts = window_starts(len(data), T, range(first, first + sequences), o.seed)
        batches = [batch(data, starts[i : i + batch_size], T, device) for i in range(0, sequences, batch_size)]
        loss, reg, norm = trainer.step(batches, lr)
        in_a_row = 0 if math.isfinite(norm) else in_a_row + 1
        skipped += in_a_row > 0
        if in_a_row == 10:
            sys.exit(f"The gradient was not finite in ten steps in a row, up to {step}: try a smaller --lr. "
                     "What was saved before is kept.")
        shared = torch.tensor([loss, reg, len(signals)])
        if world > 1:
            dist.all_reduce(shared)  # so all processes leave the loop after the same step
        loss, reg, stop = (shared / world).tolist()
        done = step == o.steps
        run["step"], run["seconds"] = step, run["seconds"] + time.perf_counter() - started

        if rank == 0 and (step % o.log_interval == 0 or step == first_step or done):
            rate = (step - logged[0]) * o.tokens_per_step / (run["seconds"] - logged[1])
            log(loss=loss, bits_per_byte=loss * bits[0], reg=reg, lr=lr, grad=norm, tokens_per_second=rate,
                peak_mib=peak_memory(device), seconds_left=(o.steps - step) * o.tokens_per_step / rate,
                **{"mfu": rate * flops / peak} if peak else {}, **{"skipped": skipped} if skipped else {})
            logged, skipped = (step, run["seconds"]), 0

        due = step % o.eval_interval == 0 or done
        if rank == 0 and (due or stop):
            files = ["last.pt"]
            if due:
                loss = evaluate(model, val_data, o.eval_tokens, batch_size, trainer.autocast)
                if loss < run["best"]:
                    files, run["best"] = ["best.pt", "last.pt"], loss  # in this order: a kill may come between
                if done:  # more exact; but which one is the best is decided on the same text
                    loss = evaluate(model, val_data, 8 * o.eval_tokens, batch_size, trainer.autocast)
                log(val_loss=loss, val_bits_per_byte=loss * bits[1])
            if not math.isfinite(loss):
                sys.exit(f"The loss is not a number at step {step}: try a smaller --lr. What was saved before is kept.")
            for name in files:
                with aside(out / name) as file:
                    torch.save(run | dict(model=model.state_dict(), optimizer=trainer.optimizer.state_dict(),
                                          scaler=trainer.scaler.state_dict()), file)
            draw(run["metrics"], out / "loss.png")
            if o.sample_tokens and not stop:
                ids = model.eval().generate(torch.tensor([[tokenizer.end]], device=device), o.sample_tokens, 0.8)
                print("-" * 60, "".join(tokenizer.stream(i.item() for i in ids)), "-" * 60, sep="\n")
        if stop:
            break
    if rank == 0 and not done:
        sys.exit(f"Stopped after step {step}, saved in {out}: `python train.py --resume --out={out}` goes on.")
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:  # it has nothing more to do, and a thread of gloo could abort it in the shutdown of the interpreter
        os._exit(0)
    print(f"done in {run['seconds']:.0f} s of training, saved in {out}; now `python sample.py --out={out}`")


if __name__ == "__main__":
    cli(main)

"""MoEUT beside other models: what a training step and a decoded token cost, and what finished runs have reached.

    python bench.py                        `small`, in turn with the dense Transformer of its size
    python bench.py --preset=moeut-244M
    python bench.py --compare runs/*       folders of runs of train.py, over their seeds
"""

import functools
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moeut import PRESETS, MoEUT, MoEUTConfig
from train import RECIPES, Options, Trainer, cli, macs_per_token, option, parse, pick_device, read_checkpoint

PAIRS = {name: f"dense-{name.split('-')[-1]}" for name in PRESETS if name in ("tiny", "small") or "moeut" in name}
# Runs that differ in one of these, or in the model, are not seeds of the same
APART = "lr warmup hold final_lr weight_decay beta1 beta2 grad_clip dtype init_from tokenizer".split()


@dataclass
class BenchOptions:
    preset: str = option("small", "the MoEUT", choices=PAIRS)
    batch_size: int = option(0, "sequences at a time; 0 takes those of the preset's recipe", 0)
    device: str = option("auto", "auto is cuda, or else cpu; also cuda:1, mps")
    dtype: str = option("auto", "precision of the step's matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = option("auto", "torch.compile; auto is yes on CUDA with Triton", choices=("auto", "yes", "no"))
    compare: tuple = option((), "folders of finished runs: print their results side by side, and time nothing")


def bench(b: BenchOptions, rounds: int = 9):
    """Medians of a training step and of decoding in the middle of the context, timed in turn, and their ratios."""
    names, device = (b.preset, PAIRS[b.preset]), pick_device(b.device)
    torch.set_float32_matmul_precision("high")  # as in training
    o = Options(**RECIPES[b.preset] | dict(dtype=b.dtype, compile=b.compile))
    models = [MoEUT(PRESETS[name]).eval() for name in names]  # for decoding; a step sets training mode itself
    c = models[0].config  # both have the same vocabulary and block_size
    x = torch.randint(c.vocab_size, (b.batch_size or o.batch_size, c.block_size)).to(device)
    steps = [functools.partial(Trainer(model, o, device).step, [(x, x)], 1e-3) for model in models]
    texts = [functools.partial(next, model.generate(x[:1, : c.block_size // 2], 10**6)) for model in models]
    table = {"parameters": [sum(p.numel() for p in model.parameters()) for model in models],
             "MACs per token": [macs_per_token(model.config, c.block_size) for model in models]}
    for what, pair, repeats in (("decoding a token, ms", texts, 10), (f"step of {x.numel()} tokens, ms", steps, 1)):
        times = np.zeros((rounds + 2, 2))
        for i, j in np.ndindex(times.shape):  # in turn
            start = time.perf_counter()
            for _ in range(repeats):
                float(pair[j]()[0])
            times[i, j] = (time.perf_counter() - start) * 1000 / repeats
        table[what] = np.median(times[2:], axis=0).tolist()
    print(f"{device}, {torch.get_num_threads()} threads; medians of {rounds} rounds\n"
          f"{'':24} {names[0]:>14} {names[1]:>14}  ratio")
    for what, (ours, theirs) in table.items():
        digits = 2 if ours < 1e4 else 0
        print(f"{what:24} {ours:14,.{digits}f} {theirs:14,.{digits}f} {ours / theirs:6.2f}")


def compare(folders: list[str]):
    """A line for each model and recipe: bits per byte of the last evaluation over seeds, training time, memory."""
    groups, common = {}, None
    for folder in folders:
        run = read_checkpoint(Path(folder))
        try:
            o, c, metrics = Options(**run["options"]), MoEUTConfig(**run["config"]), run["metrics"]
            memory = max(m.get("peak_mib") or 0 for m in metrics)  # null on Windows
            step, bits = [(m["step"], m["val_bits_per_byte"]) for m in metrics if "val_loss" in m][-1]
        except (KeyError, TypeError, ValueError, IndexError):
            sys.exit(f"{folder} holds no run that has been evaluated: --resume goes on with one.")
        conditions = dict(text_hash=run["text_hash"], step=step, steps=o.steps, tokens_per_step=o.tokens_per_step,
                          eval_tokens=o.eval_tokens, vocab_size=c.vocab_size)
        for k, v in conditions.items():
            if v != (common := common or conditions)[k]:
                sys.exit(f"These cannot be compared: {k} is {common[k]} in {folders[0]} and {v} in {folder}.")
        usual = asdict(replace(PRESETS.get(o.preset, c), vocab_size=c.vocab_size))
        usual |= asdict(Options(**RECIPES.get(o.preset, {})))
        used = asdict(c) | {k: getattr(o, k) for k in APART}
        name = " ".join([o.preset, *sorted(f"{k}={v}" for k, v in used.items() if v != usual[k])])
        groups.setdefault((name, macs_per_token(c, c.block_size)), []).append((bits, run["seconds"], memory))
    print(f"{common['step']} steps of {common['tokens_per_step']} tokens; bits per byte: mean, lowest, highest\n"
          f"{'model':40} runs   MACs/token bits/byte     low    high  seconds    MiB")
    for (name, macs), runs in sorted(groups.items(), key=lambda group: np.mean(group[1], axis=0)[0]):
        bits, seconds, memory = zip(*runs, strict=True)
        print(f"{name:40} {len(runs):4} {macs:12,} {np.mean(bits):9.4f} {min(bits):7.4f} {max(bits):7.4f} "
              f"{np.median(seconds):8.0f} {np.median(memory):6.0f}")


def main():
    b = BenchOptions(**parse(__doc__, BenchOptions)[0])
    compare(b.compare) if b.compare else bench(b)


if __name__ == "__main__":
    cli(main)

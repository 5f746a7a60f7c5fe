"""Sample text from a checkpoint of train.py, look at its experts, or score it.

    python sample.py                                     the last run, from nothing
    python sample.py --prompt="def main" --n_samples=3
    python sample.py --prompt_file=story.txt             a file, or - for standard input
    python sample.py --prompt="def main" --show_experts  which experts the tokens choose, layer by layer
    python sample.py --tasks blimp piqa                  lm-evaluation-harness: pip install -e '.[eval]'

From top to bottom: options; checkpoints, also those of the paper's authors; sampling; experts; scores.
"""

import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from moeut import MoEUT, MoEUTConfig, Router, from_authors, preset
from train import Options, Tokenizer, UserError, cli, load_model, option, parse, pick_device, read_checkpoint


@dataclass
class SampleOptions:
    out: str = option(Options.out, "folder of the run, or a checkpoint such as out/best.pt")
    prompt: str = option("", "text to continue; by default a new document is begun")
    prompt_file: str = option("", "file with the text to continue; - is standard input")
    n_samples: int = option(1, "how many continuations; they are generated together", 1, 4097)
    max_new_tokens: int = option(300, "length of a sample; the end-of-text token ends it earlier", 1)
    temperature: float = option(0.8, "below 1 is more predictable, 0 takes the most likely token always", 0)
    top_k: int = option(0, "keep the k most likely tokens only; 0 keeps all", 0)
    top_p: float = option(1.0, "keep the fewest tokens that make up this probability", 1e-6, math.nextafter(1, 2))
    seed: int = option(0, "the same seed gives the same text", 0, 2**63)
    show_experts: bool = option(False, "do not continue the prompt: show the experts that its tokens choose")
    tasks: list[str] = option([], "scores: tasks of the lm-evaluation-harness, or folders or YAML files of your own")
    limit: int = option(0, "documents of each task; 0 takes all", 0)
    tokenizer: str = option("", "the SentencePiece .model, for weights of the paper's authors")
    preset: str = option("", "the model, for a state dict of the authors, which does not say what it is")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class SentencePiece(Tokenizer):
    """A tokenizer of the authors' kind."""

    def __init__(self, path: str):
        try:
            from sentencepiece import SentencePieceProcessor

            p = SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except ImportError:
            raise UserError("A SentencePiece model needs a package: pip install -e '.[sentencepiece]'") from None
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model.") from None
        text = [b"" if p.is_control(i) else p.id_to_piece(i).replace("\u2581", " ").encode() for i in range(len(p))]
        self.tokens = [bytes([int(t[1:-1], 16)]) if p.is_byte(i) else t for i, t in enumerate(text)]
        self.n_vocab, self.end, self.name = len(p), max(p.eos_id(), 0), path
        self.encode = lambda text: np.array(p.encode(text), np.uint32)


def load(o: SampleOptions) -> tuple[MoEUT, Tokenizer]:
    """A checkpoint of train.py; or of the authors' training code; or a state dict of their clean repository."""
    path, stored = Path(o.out), read_checkpoint(Path(o.out))
    args = (stored.get("run_invariants") or {}).get("args")
    if "config" in stored or "run_invariants" not in stored and "embedding.weight" not in stored:
        if o.tokenizer or o.preset:
            raise UserError(f"--{'tokenizer' if o.tokenizer else 'preset'} cannot be given: {path} says what it is.")
        return load_model(path)[:2]
    if not o.tokenizer or not args and not o.preset:
        raise UserError(f"{path} holds weights of the paper's authors: give their --tokenizer=file.model"
                        + ", and a --preset such as moeut-44M." * (not args))
    try:
        weights = stored["model"] if args else stored
        n = len(weights["embedding.weight"])
        config = authors_config(args, weights) if args else preset(o.preset, vocab_size=n)
        model, tokenizer = from_authors(weights, config), SentencePiece(o.tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} does not fit: {str(e).splitlines()[-1].strip()}") from None
    if tokenizer.n_vocab != config.vocab_size:
        raise UserError(f"{path} knows {config.vocab_size} tokens and {o.tokenizer} has {tokenizer.n_vocab}.")
    return model, tokenizer


def authors_config(args: dict, weights: dict) -> MoEUTConfig:
    """The sizes of a model of the authors' training code, from its command line and its weights."""
    same = {"transformer.universal.group_type": "abab", "rope.rotate_fraction": 0.5, "rope.base": 10000}
    for name, known in same.items():
        if args.get(name, known) != known:
            raise ValueError(f"it was trained with {name} {args[name]}, and only {known} is known here")
    (E, C, F), H = weights["unique_layers.0.pkm.keys"].shape, args["transformer.n_heads"]
    return MoEUTConfig(
        vocab_size=len(weights["embedding.weight"]), block_size=args["lm.unroll"], n_embd=C, n_head=H, n_expert=E,
        expert_size=F, top_k=args["pkm.n_heads"], att_top_k=args["moe.att.k"],
        n_layer=args["transformer.encoder_n_layers"], group_size=sum(name.endswith("pkm.keys") for name in weights),
        head_size=len(weights["unique_layers.0.self_attn.projections.q"]) // H,
        n_att_expert=len(weights["unique_layers.0.self_attn.selections.v"]) // H)


def read_prompt(o: SampleOptions) -> str:
    if o.prompt and o.prompt_file:
        raise UserError("--prompt and --prompt_file are both given: give one of them.")
    if not o.prompt_file:
        return o.prompt
    try:
        text = (sys.stdin.buffer.read() if o.prompt_file == "-" else Path(o.prompt_file).read_bytes()).decode()
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file: {o.prompt_file} is not UTF-8 text.") from None
    if not text:
        raise UserError(f"--prompt_file: {o.prompt_file} is empty: give some text to continue.")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample(model: MoEUT, tokenizer: Tokenizer, o: SampleOptions, prompt: str, idx: torch.Tensor):
    generator = torch.Generator(idx.device).manual_seed(o.seed)
    started, count = time.time(), 0

    def tokens():
        nonlocal count
        live = torch.ones(len(idx), dtype=torch.bool)
        for token in model.generate(idx, o.max_new_tokens, o.temperature, o.top_k or None, o.top_p, generator):
            token = token.cpu()
            live &= token != tokenizer.end
            count += len(token)
            yield token.tolist()
            if not live.any():
                return

    if o.n_samples == 1:  # streamed; several are shown when they are complete
        print(prompt, end="", flush=True)
        for text in tokenizer.stream(row[0] for row in tokens()):
            print(text, end="", flush=True)
        print()
    else:
        for row in zip(*tokens(), strict=True):
            print(prompt, *tokenizer.stream(row), sep="", end="\n" + "-" * 60 + "\n")
    seconds = time.time() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s on {idx.device}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@torch.no_grad()
def show_experts(model: MoEUT, tokenizer: Tokenizer, idx: torch.Tensor):
    """The text once per layer application, every token with the feedforward expert that has its largest gate; and how
    evenly and how constantly all experts are used."""
    chosen = defaultdict(list)  # of each router, one (gate, expert) for each repeat, without the batch
    routers = {m: name for name, m in model.named_modules() if isinstance(m, Router)}
    if not routers:
        raise UserError("This model has no experts.")
    for router in routers:
        router.register_forward_hook(lambda router, _, out: chosen[router].append((out[0][0], out[1][0])))
    model(idx)
    words = [tokenizer.tokens[i].decode(errors="replace") if i < len(tokenizer.tokens) else "" for i in idx[0].tolist()]
    G = model.config.group_size
    for i in range(model.config.n_layer):
        if (router := getattr(model.layers[i % G].ffn, "router", None)) is None:
            continue
        gate, expert = chosen[router][i // G]                                    # [T, K] both
        best = expert.gather(1, gate.argmax(1, keepdim=True)).flatten().tolist()
        print(f"\nlayer {'ABCDEFGHIJKL'[i % G]}, application {i + 1} of {model.config.n_layer}")
        for word, e in zip(words, best, strict=True):
            mark = f"\x1b[48;5;{17 + e * 89 % 214}m{word}\x1b[0m" if sys.stdout.isatty() else f"{word}[{e}]"
            print(mark.replace("\n", "\\n\n"), end="")
        print()
    print(f"\n{'experts of':32} {'used':>6} {'evenness':>9} {'kept from repeat to repeat':>27}")
    for router, name in routers.items():
        n = router.shape[-1]
        expert = torch.stack([e.flatten(1, -2) if e.dim() > 2 else e[:, None] for _, e in chosen[router]])
        counts = torch.nn.functional.one_hot(expert, n).sum((1, 3))              # [R, choices, n]
        p = counts.sum(0) / counts.sum((0, 2))[:, None]                          # [choices, n]
        evenness = (torch.special.entr(p).sum(-1) / math.log(n)).mean()
        same = (expert[1:, :, :, :, None] == expert[:-1, :, :, None]).any(-1).float().mean()
        print(f"{name:32} {(p > 0).float().mean():6.0%} {evenness:9.2f} {same:27.0%}")


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def log_likelihoods(model: MoEUT, pairs: list, batch_tokens: int = 8192) -> list[tuple[float, bool]]:
    """Of (context, continuation) token ids: log probability of the continuation, and whether it is the most likely."""
    window, device, found = model.config.block_size, model.head.weight.device, {}
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    while order:
        longest = min(len(pairs[order[0]][0]) + len(pairs[order[0]][1]), window + 1)
        batch, order = order[: max(batch_tokens // longest, 1)], order[max(batch_tokens // longest, 1) :]
        rows = [torch.tensor([*pairs[i][0], *pairs[i][1]][-window - 1 :]) for i in batch]
        padded = pad_sequence(rows, batch_first=True).to(device)
        with torch.inference_mode():
            logp = model(padded[:, :-1]).logits.float().log_softmax(-1)
        target = padded[:, 1:, None]
        likely = (logp.argmax(-1, keepdim=True) == target).squeeze(-1)
        logp = logp.gather(-1, target).squeeze(-1)                               # [B, T]
        for i, row, lp, ok in zip(batch, rows, logp, likely, strict=True):
            part = slice(max(len(row) - 1 - len(pairs[i][1]), 0), len(row) - 1)
            found[i] = lp[part].sum().item(), bool(ok[part].all())
    return [found[i] for i in range(len(pairs))]


def evaluate_tasks(model: MoEUT, tokenizer: Tokenizer, tasks: list[str], limit: int):
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    except ImportError:
        raise UserError("--tasks needs EleutherAI's lm-evaluation-harness: pip install -e '.[eval]'") from None

    class Adapter(LM):
        def loglikelihood(self, requests, **_):
            pairs = []
            for context, continuation in (r.args for r in requests):
                space = len(context) - len(context.rstrip())  # belongs to the next word
                context, continuation = context[: len(context) - space], context[len(context) - space :] + continuation
                start = tokenizer.encode(context).tolist() if context else []
                whole = tokenizer.encode(context + continuation).tolist()
                pairs.append(([tokenizer.end, *whole[: len(start)]], whole[len(start) :]))
            return log_likelihoods(model, pairs)

        def loglikelihood_rolling(self, requests, **_):
            totals = []
            for (text,) in (r.args for r in requests):
                ids = tokenizer.encode(text).tolist()
                cut = get_rolling_token_windows(ids, tokenizer.end, model.config.block_size, 1)
                totals.append(sum(lp for lp, _ in log_likelihoods(model, list(map(make_disjoint_window, cut)))))
            return totals

        def generate_until(self, requests, **_):
            raise UserError("Only tasks that score given text can be evaluated, not those that generate it.")

    names = [str(f) for t in tasks for f in (sorted(Path(t).glob("*.yaml")) if Path(t).is_dir() else [t])]
    names = [str(Path(n).absolute()) if n.endswith(".yaml") else n for n in names]
    try:
        results = simple_evaluate(Adapter(), tasks=names, limit=limit or None)
    except (KeyError, ValueError, OSError) as e:  # no such task, or no network
        raise UserError(f"--tasks: {str(e).splitlines()[0]}") from None
    print(make_table(results) + ("\n" + make_table(results, "groups") if results.get("groups") else ""))


def main():
    given, _ = parse(SampleOptions, __doc__)
    o = SampleOptions(**given)
    prompt, device = read_prompt(o), pick_device(o.device)
    model, tokenizer = load(o)
    model.to(device).eval()
    if o.tasks:
        return evaluate_tasks(model, tokenizer, o.tasks, o.limit)
    ids, window = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.end], model.config.block_size
    if len(ids) > window:
        print(f"the prompt has {len(ids)} tokens, of which the newest {window} are read", file=sys.stderr)
    if o.show_experts:
        return show_experts(model, tokenizer, torch.tensor([ids[-window:]], device=device))
    sample(model, tokenizer, o, prompt, torch.tensor([ids] * o.n_samples, device=device))


if __name__ == "__main__":
    cli(main)

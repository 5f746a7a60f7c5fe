"""Sample text from a checkpoint of train.py, look at its experts, or score it.

    python sample.py                                     the run in out, from nothing
    python sample.py --prompt="def main" --n_samples=3
    python sample.py --prompt_file=story.txt             a file, or - for standard input
    python sample.py --prompt="def main" --show_experts  which experts the tokens choose, layer by layer
    python sample.py --tasks blimp piqa                  lm-evaluation-harness: pip install -e '.[eval]'

From top to bottom: options; checkpoints, also those of the paper's authors; sampling; experts; scores.
"""

import itertools
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from moeut import PRESETS, MoEUT, Router, from_authors
from text import SentencePiece, Tokenizer
from train import Options, cli, load_model, option, parse, pick_device, read_checkpoint


@dataclass
class SampleOptions:
    out: str = option(Options.out, "folder of the run, or a checkpoint such as out/best.pt")
    prompt: str = option("", "text to continue; by default a new document is begun", read=str)
    prompt_file: str = option("", "file with the text to continue; - is standard input")
    n_samples: int = option(1, "how many continuations; they are generated together", 1, 4097)
    max_new_tokens: int = option(300, "length of a sample; the end-of-text token ends it earlier", 1)
    temperature: float = option(0.8, "below 1 is more predictable, 0 takes the most likely token always", 0)
    top_k: int = option(0, "keep the k most likely tokens only; 0 keeps all", 0)
    top_p: float = option(1.0, "keep the fewest tokens that make up this probability", 1e-6, math.nextafter(1, 2))
    seed: int = option(0, "the same seed gives the same text", 0, 2**63)
    show_experts: bool = option(False, "do not continue the prompt: show the experts that its tokens choose")
    tasks: tuple = option((), "scores: tasks of the lm-evaluation-harness, or folders or YAML files of your own")
    limit: int = option(0, "documents of each task; 0 takes all", 0)
    tokenizer: str = option("", "the SentencePiece .model, for weights of the paper's authors")
    preset: str = option("", "the model, for weights of the paper's authors", choices=PRESETS)
    device: str = option("auto", "auto is cuda, or else cpu; also cuda:1, mps")


def load(o: SampleOptions) -> tuple[MoEUT, Tokenizer]:
    """A checkpoint of train.py; or of the authors' training code; or a state dict of their clean repository."""
    stored = read_checkpoint(path := Path(o.out))
    args = (stored.get("run_invariants") or {}).get("args", {})
    if not args and "embedding.weight" not in stored:
        if o.tokenizer or o.preset:
            sys.exit(f"--{'tokenizer' if o.tokenizer else 'preset'} cannot be given: {path} says what it is.")
        return load_model(path, stored)[:2]
    if not o.tokenizer or not o.preset:
        sys.exit(f"{path} holds weights of the authors: give also --tokenizer=file.model and --preset=moeut-44M or so.")
    same = {"transformer.universal.group_type": "abab", "rope.rotate_fraction": 0.5, "rope.base": 10000}
    for name, known in same.items():
        if args.get(name, known) != known:
            sys.exit(f"{path} was trained with {name} {args[name]}: only {known} is known here.")
    try:
        weights = stored.get("model", stored)
        model = from_authors(weights, replace(PRESETS[o.preset], vocab_size=len(weights["embedding.weight"])))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        sys.exit(f"{path} does not fit --preset={o.preset} ({str(e).splitlines()[-1].strip()}).")
    if (tokenizer := SentencePiece(o.tokenizer)).n_vocab != model.config.vocab_size:
        sys.exit(f"{path} knows {model.config.vocab_size} tokens and {o.tokenizer} has {tokenizer.n_vocab}.")
    return model, tokenizer


def read_prompt(o: SampleOptions) -> str:
    if o.prompt and o.prompt_file:
        sys.exit("--prompt and --prompt_file are both given: give one of them.")
    try:
        if o.prompt_file:
            with open(0 if o.prompt_file == "-" else o.prompt_file, encoding="utf-8", newline="") as file:
                return file.read() or sys.exit(f"--prompt_file: {o.prompt_file} is empty: give some text to continue.")
        return o.prompt.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError:
        sys.exit(f"The prompt{' in ' + o.prompt_file if o.prompt_file else ''} is not UTF-8 text.")


def sample(model: MoEUT, tokenizer: Tokenizer, o: SampleOptions, prompt: str, idx: torch.Tensor):
    generator = torch.Generator(idx.device).manual_seed(o.seed)
    started, rows = time.perf_counter(), []

    def tokens():
        for token in model.generate(idx, o.max_new_tokens, o.temperature, o.top_k or None, o.top_p, generator):
            rows.append(token.tolist())
            yield rows[-1]

    for i, steps in enumerate(itertools.tee(tokens(), o.n_samples)):  # the first one is shown while it grows
        for text in itertools.chain([prompt], tokenizer.stream(row[i] for row in steps)):
            print(text, end="", flush=True)
        print("\n" + "-" * 60 if o.n_samples > 1 else "")
    seconds, count = time.perf_counter() - started, len(rows) * o.n_samples
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s on {idx.device}", file=sys.stderr)


@torch.no_grad()
def show_experts(model: MoEUT, tokenizer: Tokenizer, idx: torch.Tensor):
    """The text once per layer application, every token with the feedforward expert that has its largest gate; and how
    evenly and how constantly all experts are used."""
    routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    if not routers:
        sys.exit("This model has no experts.")
    calls = []  # (name, gate, expert) of the routers as they were called, without the batch
    for name, router in routers.items():
        router.register_forward_hook(lambda _, __, out, name=name: calls.append((name, out[0][0], out[1][0])))
    model(idx)
    words = [tokenizer.tokens.get(i, b"").decode(errors="replace") for i in idx[0].tolist()]
    feedforward = [call for call in calls if "ffn" in call[0]]
    for i, (name, gate, expert) in enumerate(feedforward, 1):                    # [T, K] both
        best = expert.gather(1, gate.argmax(1, keepdim=True)).flatten().tolist()
        print(f"\nlayer {int(name.split('.')[1]) + 1} of {len(model.layers)}, application {i} of {len(feedforward)}")
        for word, e in zip(words, best, strict=True):
            mark = f"\x1b[48;5;{17 + e * 89 % 214}m{word}\x1b[0m" if sys.stdout.isatty() else f"{word}[{e}]"
            print(mark.replace("\n", "\\n\n"), end="")
        print()
    print(f"\n{'experts of':32} {'used':>6} {'entropy / log E':>16} {'kept from repeat to repeat':>27}")
    for name, router in routers.items():
        n = router.shape[-1]
        repeats = torch.stack([expert for called, _, expert in calls if called == name])
        expert = repeats.view(len(repeats), len(words), -1, router.top_k)        # [R, T, pools, K]
        counts = F.one_hot(expert, n).sum((1, 3))                                # [R, pools, n]
        p = counts.sum(0) / counts.sum((0, 2))[:, None]                          # [pools, n]
        evenness = (torch.special.entr(p).sum(-1) / math.log(max(n, 2))).mean()
        same = (expert[1:, ..., None] == expert[:-1, ..., None, :]).any(-1).float().mean()
        kept = f"{same:.0%}" if len(repeats) > 1 else "-"
        print(f"{name:32} {(p > 0).float().mean():6.0%} {evenness:16.2f} {kept:>27}")


def log_likelihoods(model: MoEUT, pairs: list, batch_tokens: int = 8192) -> list[tuple[float, bool]]:
    """Of (context, continuation) token ids: log probability of the continuation, and whether it is the most likely. The
    newest block_size + 1 ids are read; of a continuation as long as that, its last block_size count."""
    rows = [torch.tensor([*context, *end][-model.config.block_size - 1 :]) for context, end in pairs]
    found, order = {}, sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        n = max(batch_tokens // len(rows[order[0]]), 1)
        some, order = order[:n], order[n:]
        padded = pad_sequence([rows[i] for i in some], batch_first=True).to(model.lm_head.weight.device)
        with torch.inference_mode():
            logits, target = model(padded[:, :-1]).logits.float(), padded[:, 1:]
        nats, likely = F.cross_entropy(logits.mT, target, reduction="none"), logits.argmax(-1) == target    # [B, T]
        for i, nat, ok in zip(some, nats, likely, strict=True):
            part = slice(max(len(rows[i]) - 1 - len(pairs[i][1]), 0), len(rows[i]) - 1)
            found[i] = -nat[part].sum().item(), bool(ok[part].all())
    return [found[i] for i in range(len(pairs))]


def evaluate_tasks(model: MoEUT, tokenizer: Tokenizer, tasks: list[str], limit: int):
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    except ImportError:
        sys.exit("--tasks needs EleutherAI's lm-evaluation-harness: pip install -e '.[eval]'")

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.end

        def tok_encode(self, string, **_):
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests, **_):  # begin a document; for an empty context lm_eval has done so
            pairs = [([tokenizer.end, *c] if text[0] else c, end) for text, c, end in requests]
            return log_likelihoods(model, pairs)

        def loglikelihood_rolling(self, requests, **_):
            T = model.config.block_size
            cuts = (get_rolling_token_windows(self.tok_encode(*r.args), tokenizer.end, T, 1) for r in requests)
            return [sum(lp for lp, _ in log_likelihoods(model, list(map(make_disjoint_window, cut)))) for cut in cuts]

        def generate_until(self, requests, **_):
            sys.exit("Only tasks that score given text can be evaluated, not those that generate it.")

    names = [str(f) for t in tasks for f in (sorted(Path(t).glob("*.yaml")) if Path(t).is_dir() else [t])]
    try:
        results = simple_evaluate(Adapter(), tasks=names, limit=limit or None)
    except (KeyError, ValueError, OSError) as e:  # no such task, or no network
        sys.exit(f"--tasks: {str(e).splitlines()[0]}")
    print(make_table(results) + ("\n" + make_table(results, "groups") if results.get("groups") else ""))


def main():
    o = SampleOptions(**parse(__doc__, SampleOptions)[0])
    prompt, device = read_prompt(o), pick_device(o.device)
    model, tokenizer = load(o)
    model.to(device).eval()
    if o.tasks:
        return evaluate_tasks(model, tokenizer, o.tasks, o.limit)
    ids, window = tokenizer.encode(prompt).tolist() or [tokenizer.end], model.config.block_size
    if len(ids) > window:
        print(f"the prompt has {len(ids)} tokens, of which the newest {window} are read", file=sys.stderr)
    if o.show_experts:
        return show_experts(model, tokenizer, torch.tensor([ids[-window:]], device=device))
    sample(model, tokenizer, o, prompt, torch.tensor([ids] * o.n_samples, device=device))


if __name__ == "__main__":
    cli(main)

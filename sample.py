"""Sample text from a checkpoint of train.py.

    python sample.py                                     the last run, from nothing
    python sample.py --prompt="def main" --n_samples=3
    python sample.py --prompt_file=story.txt             a file, or - for standard input
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from train import Options, load_model, option, parse_options, pick_device


@dataclass
class SampleOptions:
    out: str = option(Options.out, "folder of the checkpoint, or the file itself")
    prompt: str = option("", "text to continue; by default a new document is begun")
    prompt_file: str = option("", "file with the text to continue; - is standard input")
    n_samples: int = option(1, "how many continuations; they are generated together")
    max_new_tokens: int = option(500, "length of a sample; the end-of-text token ends it earlier")
    temperature: float = option(0.8, "below 1 is more predictable, 0 takes the most likely token always")
    top_k: int = option(0, "keep the k most likely tokens only; 0 keeps all")
    top_p: float = option(1.0, "keep the fewest tokens that make up this probability")
    seed: int = option(0, "the same seed gives the same text")
    tokenizer: str = option("bytes", "for a checkpoint of the paper's authors, which holds none; see train.py")
    preset: str = option("tiny", "for a bare state dict of the authors, which does not say what model it is")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


def read_prompt(options: SampleOptions, given: dict) -> str | None:
    if not options.prompt_file:
        if "prompt" in given and not options.prompt:
            sys.exit("--prompt is empty: give some text, or leave it out to begin a new document.")
        return options.prompt or None
    if options.prompt:
        sys.exit("--prompt and --prompt_file are both given: give one of them.")
    try:
        file = sys.stdin.buffer if options.prompt_file == "-" else open(options.prompt_file, "rb")
        with file:
            text = file.read().decode()
    except OSError as e:
        sys.exit(f"--prompt_file: {options.prompt_file} cannot be read: {e.strerror}.")
    except UnicodeDecodeError:
        sys.exit(f"--prompt_file: {options.prompt_file} is not UTF-8 text.")
    if not text:
        sys.exit(f"--prompt_file: {options.prompt_file} is empty: give some text to continue.")
    return text


def main():
    given = parse_options(SampleOptions, __doc__)
    options = SampleOptions(**given)
    for name, ok, rule in (
        ("n_samples", options.n_samples >= 1, "at least 1"),
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", options.temperature >= 0, "at least 0"),
        ("top_k", options.top_k >= 0, "at least 0"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
    ):
        if not ok:
            sys.exit(f"--{name} is {getattr(options, name)}: it must be {rule}.")
    prompt = read_prompt(options, given)
    device = pick_device(options.device)
    model, tokenizer = load_model(Path(options.out), options.tokenizer, options.preset, {})
    model.to(device).eval()

    try:
        ids = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.end]
    except ValueError as e:
        sys.exit(str(e))
    idx = torch.tensor([ids] * options.n_samples, device=device)
    generator = torch.Generator(device).manual_seed(options.seed)
    started, count = time.time(), 0

    def tokens():
        nonlocal count
        live = torch.ones(options.n_samples, dtype=torch.bool)
        for token in model.generate(
                idx, options.max_new_tokens, options.temperature, options.top_k or None, options.top_p, generator):
            token = token.cpu()
            live &= token != tokenizer.end
            count += len(token)
            yield token.tolist()
            if not live.any():
                break

    try:
        if options.n_samples == 1:  # streamed; several are shown when they are complete
            print(prompt or "", end="", flush=True)
            for text in tokenizer.stream(row[0] for row in tokens()):
                print(text, end="", flush=True)
            print()
        else:
            for sample in zip(*tokens()):
                print(prompt or "", *tokenizer.stream(sample), sep="", end="\n" + "-" * 60 + "\n")
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:
        sys.stderr.close()
        return
    seconds = time.time() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):.0f} tokens/s on {device}", file=sys.stderr)


if __name__ == "__main__":
    main()

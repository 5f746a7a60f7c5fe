"""Text to tokens, for train.py and sample.py: the tokenizer; files to memory-mapped tokens; the batches."""

import codecs
import contextlib
import functools
import glob
import hashlib
import itertools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch

# Tokenizer: a tiktoken.Encoding, made from a `spec` of plain data that a checkpoint can hold -------------------------

WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s{1,999}(?!\S)|\s{1,999}"  # bytes are merged within these


def make_spec(name: str, texts, vocab_size: int) -> dict:
    """What tiktoken.Encoding takes, for the tokenizer of that name. bpe is trained on the texts, and has fewer tokens
    than vocab_size if there is nothing left to merge; bytes merges nothing."""
    if name in ("bpe", "bytes"):
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, max(vocab_size - 1, 256), pattern=WORDS)
        ranks = {bytes(token): i for token, i in trainer.get_mergeable_ranks()}
        return dict(name=name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    try:
        e = tiktoken.get_encoding(name)
    except Exception:  # no such name, or whatever a download may raise
        known = ", ".join(tiktoken.list_encoding_names())
        sys.exit(f"--tokenizer is {name!r}: it must be bpe, bytes, or, with a network, one of tiktoken's {known}.")
    return dict(name=name, pat_str=e._pat_str, mergeable_ranks=e._mergeable_ranks, special_tokens=e._special_tokens)


class Tokenizer:
    """encode and decode; `end` is the token that closes a document."""

    def __init__(self, spec: dict):
        encoding = tiktoken.Encoding(**spec)
        self.spec, self.name, self.end, self.n_vocab = spec, encoding.name, encoding.eot_token, encoding.n_vocab
        self.tokens = {i: token for token, i in spec["mergeable_ranks"].items()}
        self.encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())  # text -> ids

    def stream(self, ids):
        """Text of the tokens as they come, in whole characters, up to the end of text."""
        ids = itertools.takewhile(lambda i: i != self.end, ids)
        tokens = (self.tokens.get(i, b"") for i in ids)  # an id without a token pads the vocabulary
        return codecs.iterdecode(tokens, "utf-8", errors="replace")


class SentencePiece(Tokenizer):
    """A tokenizer of the authors' kind."""

    def __init__(self, path: str):
        try:
            from sentencepiece import SentencePieceProcessor

            p = SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except (ImportError, RuntimeError):
            sys.exit(f"{path} is no SentencePiece model, or the package is missing: pip install -e '.[sentencepiece]'")
        text = [b"" if p.is_control(i) else p.id_to_piece(i).replace("\u2581", " ").encode() for i in range(len(p))]
        self.tokens = {i: bytes([int(t[1:-1], 16)]) if p.is_byte(i) else t for i, t in enumerate(text)}
        self.n_vocab, self.end = len(p), max(p.eos_id(), 0)
        self.encode = lambda text: np.array(p.encode(text), np.uint32)


# Text to tokens, in memory-mapped files of the user's cache folder that all runs on the same text share --------------

WRITTEN = ("last.pt", "best.pt", "metrics.jsonl", "loss.png")  # by train.py, in the folder of a run


def find_files(patterns) -> list[Path]:
    """The files that --data names, each once; in a folder not the hidden ones, nor those of a run of this program."""
    if not patterns:  # the standard library: real code and prose, on every machine
        root, skip = Path(os.__file__).parent, {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    files = set()
    for pattern in patterns:
        tops = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        found = {Path(p) for top in tops for p in (top, *glob.glob(f"{glob.escape(top)}/**", recursive=True))}
        found = {p.resolve() for p in found if p.is_file() and (p.name not in WRITTEN or pattern.endswith(p.name))}
        if not found:
            sys.exit(f"--data: there is no text at {pattern!r}: give a file, a folder with files, or a pattern.")
        files |= found
    return sorted(files)


def texts(path: Path):
    """The text of a file in pieces of about a megabyte, of whole lines unless they are as long. Raises
    UnicodeDecodeError."""
    with open(path, encoding="utf-8", newline="") as file:
        while text := file.read(1 << 20) + file.readline(1 << 20):
            yield text


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
            print(f"left out, because it is not UTF-8 text: {path}")
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


@contextlib.contextmanager
def aside(path: Path):
    """A file to write to, renamed to path at the end: whatever happens, there is never half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except OSError as e:
        e.filename = e.filename or path  # which a full disk does not say
        raise
    except RuntimeError:  # of torch.save
        sys.exit(f"{path} cannot be written. Is the disk full? What was saved before is kept.")
    finally:
        part.unlink(missing_ok=True)


def write_tokens(path: Path, documents, tokenizer: Tokenizer, dtype):
    """A header of 64 bytes: the tokens of both parts, the bytes of both, the hash of the text. Then the tokens."""
    count, shown = np.zeros((2, 2), np.int64), time.time()
    with aside(path) as file:
        file.write(bytes(64))
        for part, text in split(documents):
            ids = [tokenizer.end] if text is None else tokenizer.encode(text)
            file.write(np.asarray(ids, dtype).tobytes())
            count[:, part] += len(ids), len((text or "").encode())
            if time.time() > shown + 2:
                shown = time.time()
                print(f"tokenizing: {count[1].sum() / 1e6:.0f} MB")
        file.seek(0)
        file.write(count.tobytes() + hashlib.sha256("".join(d for d, _, _ in documents).encode()).digest())


def read_tokens(path: Path, dtype):
    """The tokens of both parts; bits per byte for a nat per token, of both; the hash. Raises OSError or ValueError."""
    n_train, n_val, b_train, b_val, *text_hash = np.fromfile(path, np.int64, 8).tolist()
    tokens = np.memmap(path, dtype, "r", 64, (n_train + n_val,))
    bits = [n / max(b, 1) / math.log(2) for n, b in ((n_train, b_train), (n_val, b_val))]
    return tokens[:n_train], tokens[n_train:], bits, text_hash


def load_text(patterns, name: str, vocab_size: int, tokenizer: Tokenizer | None):
    """Returns the tokenizer, made from its name and the text if it is not given; the tokens for training and for
    validation, where `end` closes every document; what turns nats per token into bits per byte, for both; a hash."""
    files = find_files(patterns)
    documents = functools.cache(lambda: read_documents(files))
    if not tokenizer:
        train, enough = (), 200  # pieces for the tokenizer, or as many as make a million characters, if they are short
        if name == "bpe":
            train = (text for part, text in split(documents()) if part == 0 and text)
            enough = max(enough, 10**6 * len(documents()) // (1 + sum(n for _, n, _ in documents())))
        tokenizer = Tokenizer(make_spec(name, itertools.islice(train, enough), vocab_size))
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    key = repr([tokenizer.spec, [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]]).encode()
    cache = os.getenv("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "moeut", hashlib.sha256(key).hexdigest()[:24])
    try:
        return tokenizer, *read_tokens(path, dtype)
    except (OSError, ValueError):  # not there, or damaged
        write_tokens(path, documents(), tokenizer, dtype)
    return tokenizer, *read_tokens(path, dtype)


# Batches -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def epoch_starts(n_tokens: int, T: int, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the n windows of an epoch begin, in its order: side by side in the text, from a random offset."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n) * T + rng.integers(min(T, n_tokens - n * T))


def window_starts(n_tokens: int, T: int, numbers, seed: int) -> list[int]:
    """Where the training windows of these numbers begin, of T + 1 tokens each. Every epoch cuts the text anew and
    visits all windows once. What a number stands for does not depend on batch size, processes or interruptions."""
    n = max((n_tokens - T - 1) // T, 1)
    return [int(epoch_starts(n_tokens, T, n, seed, number // n)[number % n]) for number in numbers]


def batch(data: np.ndarray, starts, T: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, T], one token apart, of the windows that begin there."""
    rows = torch.from_numpy(np.stack([data[s : s + T + 1] for s in starts]).astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]

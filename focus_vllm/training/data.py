"""Text for training and measuring: from a file to tokens, and from tokens to batches."""

from __future__ import annotations

import hashlib
import lzma
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

# Long documents are cut before shuffling, so that few tokens still come from many documents.
PIECE_CHARACTERS = 65_536
# The tokenizer works on as many at once as there are cores.
PIECES_AT_ONCE = 32
SPAN_TOKENS = (16, 64)
KEY_TOKENS, VALUE_TOKENS = 4, 8


def read_documents(path: str | Path) -> list[str]:
    """Read a UTF-8 text file, plain or `.xz`, whose documents are separated by NUL bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8 text, not xz where its name says so, or holds no document.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 text: {error}") from None
    documents = [document for document in text.split("\0") if document.strip()]
    if not documents:
        raise ValueError(f"data file {str(path)!r} holds no text")
    return documents


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def shuffled_tokens(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int
) -> torch.Tensor:
    """Tokenise shuffled pieces of `documents` until there are `num_tokens` tokens, or no piece is left.

    Each piece is followed by the tokenizer's end-of-text token, if it has one.

    Returns:
        `[at most num_tokens]`, int64.
    """
    pieces = [
        document[start : start + PIECE_CHARACTERS]
        for document in documents
        for start in range(0, len(document), PIECE_CHARACTERS)
    ]
    random.Random(seed).shuffle(pieces)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    tokens: list[int] = []
    while pieces and len(tokens) < num_tokens:
        for ids in tokenize(tokenizer, pieces[:PIECES_AT_ONCE]):
            tokens += ids + end
        del pieces[:PIECES_AT_ONCE]
    return torch.tensor(tokens[:num_tokens], dtype=torch.long)


def sample_batch(
    tokens: torch.Tensor, batch_size: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Cut `batch_size` random windows out of `tokens`: `[batch_size, length]`."""
    starts = torch.randint(len(tokens) - length + 1, (batch_size,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def copy_spans(batch: torch.Tensor, spans: int, distance: int, generator: torch.Generator) -> torch.Tensor:
    """Overwrite spans of each row with a copy of earlier tokens, so that looking far back pays.

    Args:
        batch: `[batch_size, length]`, changed in place.
        spans: Copies per row; each of 16 to 64 tokens.
        distance: How many tokens at least lie between a source's end and its copy.
        generator: Source of randomness.

    Returns:
        `batch`.

    Raises:
        ValueError: A row is too short for a copy at that distance.
    """
    low, high = SPAN_TOKENS
    if spans and batch.shape[1] < 2 * high + distance:
        raise ValueError(
            f"copied spans at a distance of {distance} tokens need sequences of at least "
            f"{2 * high + distance} tokens, got {batch.shape[1]}"
        )
    for row in batch:
        for _ in range(spans):
            length = _draw(low, high + 1, generator)
            source = _draw(0, len(row) - 2 * length - distance + 1, generator)
            target = _draw(source + length + distance, len(row) - length + 1, generator)
            row[target : target + length] = row[source : source + length].clone()
    return batch


def plant_pairs(batch: torch.Tensor, pairs: int, distance: int, generator: torch.Generator) -> torch.Tensor:
    """Write keys with values into each row, and the same far behind them: what was said of this key?

    Keys and values are random tokens of the row, so that only the earlier pair tells the later value.

    Args:
        batch: `[batch_size, length]`, changed in place.
        pairs: Per row.
        distance: How many tokens at least lie between a pair's end and its repetition.
        generator: Source of randomness.

    Returns:
        `batch`.

    Raises:
        ValueError: A row is too short for a pair at that distance.
    """
    size = KEY_TOKENS + VALUE_TOKENS
    if pairs and batch.shape[1] < 2 * size + distance:
        raise ValueError(
            f"key-value pairs at a distance of {distance} tokens need sequences of at least "
            f"{2 * size + distance} tokens, got {batch.shape[1]}"
        )
    for row in batch:
        for _ in range(pairs):
            pair = row[torch.randint(len(row), (size,), generator=generator)]
            source = _draw(0, len(row) - 2 * size - distance + 1, generator)
            target = _draw(source + size + distance, len(row) - size + 1, generator)
            row[source : source + size] = pair
            row[target : target + size] = pair
    return batch


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))

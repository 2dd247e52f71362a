"""Retrieval that needs no corpus: a passkey, and RULER's needles, variables and word counts.

Worded so that a base model can go on with the answer: a prompt ends in the words that came before the answer
in the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from focus_vllm.training.hf import score_tokens

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# fmt: off
WORDS = (
    "anchor", "autumn", "basket", "bottle", "branch", "bridge", "butter", "button", "candle", "carpet",
    "castle", "cattle", "circle", "copper", "corner", "cotton", "desert", "dinner", "dragon", "engine",
    "farmer", "feather", "finger", "forest", "garden", "ginger", "hammer", "harbor", "helmet", "island",
    "jacket", "jungle", "kettle", "ladder", "lantern", "lemon", "marble", "market", "meadow", "mirror",
    "morning", "needle", "orange", "palace", "pencil", "pepper", "pillow", "planet", "pocket", "prison",
    "rabbit", "ribbon", "river", "saddle", "sailor", "school", "shadow", "silver", "spider", "spring",
    "summer", "sunset", "temple", "thunder", "ticket", "timber", "tunnel", "turtle", "valley", "velvet",
    "village", "violin", "walnut", "window", "winter", "wonder",
)
# fmt: on


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One text and the answer that it ends in."""

    token_ids: torch.Tensor
    """`[num_tokens]`, int64, the answer included."""
    answer: int
    """Tokens of the answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """How well a model goes on with the answers of one task."""

    nll: float
    """Mean negative log-likelihood of the answers' tokens."""
    accuracy: float
    """Share of these tokens that are the model's first choice, given those before."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """A text in parts: `needles` stand in order at random places of filler between `head` and `question`."""

    needles: list[str]
    question: str
    answer: str
    head: str = ""
    filler: Sequence[str] = FILLER


def _passkey(choose: random.Random) -> _Task:
    key = str(choose.randrange(10_000, 100_000))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    head = "There is an important piece of information hidden inside a lot of irrelevant text."
    return _Task([needle], "What is the pass key? The pass key is", f" {key}", head)


def _niah(choose: random.Random, num_keys: int) -> _Task:
    names = choose.sample(WORDS, num_keys)
    values = [str(choose.randrange(1_000_000, 10_000_000)) for _ in names]
    needles = [f"The special magic number for {n} is: {v}." for n, v in zip(names, values, strict=True)]
    wanted = choose.randrange(num_keys)
    return _Task(needles, f"The special magic number for {names[wanted]} is:", f" {values[wanted]}")


def _niah_single(choose: random.Random) -> _Task:
    return _niah(choose, 1)


def _niah_multikey(choose: random.Random) -> _Task:
    return _niah(choose, 4)


def _variable_tracking(choose: random.Random) -> _Task:
    names = ["".join(choose.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)) for _ in range(4)]
    value = choose.randrange(10_000, 100_000)
    needles = [f"VAR {names[0]} = {value}."]
    needles += [f"VAR {later} = VAR {earlier}." for earlier, later in itertools.pairwise(names)]
    return _Task(needles, f"The variables that are assigned the value {value} are:", " " + ", ".join(names))


def _common_words(choose: random.Random) -> _Task:
    common, rare = choose.sample(WORDS, 5), list(WORDS)
    rare = [word for word in rare if word not in common]
    filler = [f"{choose.choice(common if choose.random() < 0.5 else rare)}," for _ in range(1000)]
    return _Task([], "The five words that appear most often are:", " " + ", ".join(common), filler=filler)


def _frequent_words(choose: random.Random) -> _Task:
    coined = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(40)]
    # Zipf's law with exponent 2, as RULER draws them.
    weights = [1 / rank**2 for rank in range(1, len(coined) + 1)]
    filler = [f"{word} .... " for word in choose.choices(coined, weights, k=1000)]
    return _Task(
        [], "The three words that appear most often are:", " " + ", ".join(coined[:3]), filler=filler
    )


TASKS: dict[str, Callable[[random.Random], _Task]] = {
    "passkey": _passkey,
    "niah_single": _niah_single,
    "niah_multikey": _niah_multikey,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


def make_probes(
    task: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, count: int, seed: int = 0
) -> list[Probe]:
    """Make `count` texts of one task, each of at most `num_tokens` tokens and nearly as many.

    Raises:
        ValueError: The task is unknown, or num_tokens is too few for its parts.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} must be one of {list(TASKS)}")
    choose = random.Random(f"{seed} {task}")
    return [_assemble(TASKS[task](choose), tokenizer, num_tokens, choose) for _ in range(count)]


def _assemble(
    task: _Task, tokenizer: PreTrainedTokenizerBase, num_tokens: int, choose: random.Random
) -> Probe:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    head, question, answer = encode(task.head), encode(f"\n{task.question}"), encode(task.answer)
    needles = [encode(f" {needle}") for needle in task.needles]
    filler = [encode(f" {sentence}") for sentence in task.filler]
    room = num_tokens - len(head) - len(question) - len(answer) - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"num_tokens ({num_tokens}) is too few for this task, it needs {num_tokens - room}")
    sentences: list[list[int]] = []
    while len(sentence := filler[len(sentences) % len(filler)]) <= room:
        sentences.append(sentence)
        room -= len(sentence)
    places = sorted(choose.randrange(len(sentences) + 1) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    text = head + [token for sentence in sentences for token in sentence] + question + answer
    return Probe(torch.tensor(text, dtype=torch.long), len(answer))


def score_probes(model: PreTrainedModel, probes: Sequence[Probe]) -> Score:
    """Score the answers under whatever attention `model` has."""
    scored = [score_tokens(model, probe.token_ids, probe.answer) for probe in probes]
    logprobs = torch.cat([part for part, _ in scored])
    first = torch.cat([part for _, part in scored])
    return Score(-logprobs.mean().item(), first.float().mean().item())

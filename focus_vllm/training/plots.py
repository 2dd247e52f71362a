"""PNG plots; needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focus_vllm.training.evaluate import Quality
from focus_vllm.training.tokens import Group


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'focus-vllm[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def plot_quality(rows: Sequence[Quality], path: Path) -> None:
    """Draw perplexity and recall against keys per query, perplexity by length, and the probes, as one PNG.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = _figure(11, 8)
    perplexity, recall, lengths, probes = figure.subplots(2, 2).flat
    for row in rows:
        perplexity.plot(row.keys_per_query, row.perplexity, "o", label=row.name)
        recall.plot(row.keys_per_query, row.recall, "o")
        if row.perplexity_by_length:
            lengths.plot(list(row.perplexity_by_length), list(row.perplexity_by_length.values()), "o-")
    perplexity.set(xlabel="keys per query", ylabel="perplexity", xscale="log")
    recall.set(xlabel="keys per query", ylabel="recall, NLL of a repeated span", xscale="log")
    lengths.set(xlabel="tokens", ylabel="perplexity", xscale="log")
    tasks = list(rows[0].probes)
    for number, row in enumerate(rows):
        places = [at + 0.8 * number / len(rows) for at in range(len(tasks))]
        probes.bar(places, [row.probes[task].nll for task in tasks], 0.8 / len(rows))
    probes.set_xticks([at + 0.4 for at in range(len(tasks))], tasks, rotation=20)
    probes.set(ylabel="NLL of the answer")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def plot_groups(groups: Sequence[Group], path: Path) -> None:
    """Draw each layer's groups with their share and most frequent tokens, as one PNG.

    Raises:
        ValueError: matplotlib is missing.
    """
    layers = sorted({group.layer for group in groups})
    num_groups = 1 + max(group.group for group in groups)
    shares = [[0.0] * num_groups for _ in layers]
    for group in groups:
        shares[layers.index(group.layer)][group.group] = group.share
    figure = _figure(1.5 + 1.5 * num_groups, 1 + 0.9 * len(layers))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, aspect="auto")
    for group in groups:
        # matplotlib would read dollar signs as mathematics.
        words = [repr(text)[1:-1].replace("$", r"\$") for text, _, _ in group.tokens[:4]]
        at = group.group, layers.index(group.layer)
        text = f"{group.share:.0%}, purity {group.purity:.0%}\n" + "\n".join(words)
        axes.text(*at, text, ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xticks(range(num_groups))
    axes.set(xlabel="group", ylabel="layer")
    figure.colorbar(image, label="share of tokens")
    figure.savefig(path, dpi=120)

"""Focus attention by its definition, slow and in float32: the oracle that everything is tested against."""

from __future__ import annotations

import torch

from focus_vllm.config import FocusConfig


def visible(
    i: torch.Tensor,
    j: torch.Tensor,
    query_groups: torch.Tensor,
    key_groups: torch.Tensor,
    config: FocusConfig,
) -> torch.Tensor:
    """Return whether the query at position `i` attends to the key at position `j`; arguments broadcast.

        M(i, j) = j <= i and (i < dense_below or j < sink or i - j <= window or Q_i & G_j != 0)

    Args:
        i: Query positions, integer.
        j: Key positions, integer.
        query_groups: Bitmask of the groups each query attends to (Q), integer.
        key_groups: Bitmask of the groups each key belongs to (G), integer.
        config: The mask's settings.
    """
    share = (query_groups & key_groups) != 0
    return (j <= i) & ((i < config.dense_below) | (j < config.sink) | (i - j <= config.window) | share)


def focus_mask(
    query_groups: torch.Tensor,
    key_groups: torch.Tensor,
    config: FocusConfig,
    query_start: int = 0,
) -> torch.Tensor:
    """Return `visible` for consecutive queries over all keys of one sequence.

    Args:
        query_groups: `[num_queries]`, integer bitmask of the groups each query attends to (Q).
        key_groups: `[num_keys]`, integer bitmask of the groups each key belongs to (G).
        config: The mask's settings.
        query_start: Position of the first query; keys start at position 0.

    Returns:
        `[num_queries, num_keys]`, bool.
    """
    i = torch.arange(query_start, query_start + len(query_groups), device=key_groups.device)[:, None]
    j = torch.arange(len(key_groups), device=key_groups.device)[None, :]
    return visible(i, j, query_groups[:, None], key_groups[None, :], config)


def decode_mask(query_groups: torch.Tensor, key_groups: torch.Tensor, config: FocusConfig) -> torch.Tensor:
    """Return which keys the last token of a sequence attends to when it is computed alone.

        M(i, j), and if share(i, j) is what lets j in, fewer than decode_budget far keys follow j:
        |{ j' : j < j' < i - window, j' >= sink, share(i, j') }| < decode_budget

    Without a budget it is `focus_mask`'s last row. With one, the output depends on whether a token is
    computed alone, as in decoding, or with others, as in a prompt.

    Args:
        query_groups: `[1]`, bitmask Q of the last token.
        key_groups: `[num_keys]`, bitmasks G, the last token's included.
        config: The mask's settings.

    Returns:
        `[1, num_keys]`, bool.
    """
    position = len(key_groups) - 1
    mask = focus_mask(query_groups, key_groups, config, query_start=position)
    if config.decode_budget is None or position < config.dense_below:
        return mask
    j = torch.arange(len(key_groups), device=key_groups.device)
    far = mask & (j >= config.sink) & (j < position - config.window)
    later = far.long().flip(-1).cumsum(-1).flip(-1) - far.long()
    return mask & ~(far & (later >= config.decode_budget))


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the keys that `mask` allows, in float32.

    Args:
        query: `[num_queries, num_heads, head_size]`.
        key: `[num_keys, num_kv_heads, head_size]`; num_heads is a multiple of num_kv_heads.
        value: `[num_keys, num_kv_heads, head_size]`.
        mask: `[num_queries, num_keys]`, bool.
        scale: Factor on the scores.
        softcap: Scores become softcap * tanh(score / softcap); 0 leaves them.

    Returns:
        The output `[num_queries, num_heads, head_size]` and the log-sum-exp of the scores
        `[num_queries, num_heads]`, both float32. A query with no key gives 0 and -inf.
    """
    repeats = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(repeats, dim=1)
    values = value.float().repeat_interleave(repeats, dim=1)
    scores = torch.einsum("qhd,khd->qhk", query.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    return torch.einsum("qhk,khd->qhd", weights, values), lse


def focus_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_groups: torch.Tensor,
    key_groups: torch.Tensor,
    config: FocusConfig,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Focus attention of the last `len(query)` tokens of one sequence.

    Args:
        query: `[num_queries, num_heads, head_size]`, the sequence's last tokens.
        key: `[num_keys, num_kv_heads, head_size]`, the whole sequence.
        value: `[num_keys, num_kv_heads, head_size]`.
        query_groups: `[num_queries]`, bitmasks Q.
        key_groups: `[num_keys]`, bitmasks G.
        config: The mask's settings.
        scale: Factor on the scores.
        softcap: See `masked_attention`.

    Returns:
        Output and log-sum-exp, as `masked_attention`.
    """
    mask = focus_mask(query_groups, key_groups, config, query_start=len(key) - len(query))
    return masked_attention(query, key, value, mask, scale, softcap)

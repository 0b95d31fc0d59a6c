#!/usr/bin/env bash
# 20 classes of Tiny ImageNet: two losses with seeds 0 and 1, and a frozen classifier with seed 0
# (docs/results.md). Run from the repository's root: benchmarks/tiny_imagenet_20.sh SOURCE OUTPUT
set -euo pipefail
usage="usage: benchmarks/tiny_imagenet_20.sh SOURCE OUTPUT"
source=${1:?$usage} output=${2:?$usage}

train() { # NAME FLAGS...
  .venv/bin/python -m jobs.train --output "$output/$1" --data "$output/shards" --workers 1 \
    --epochs 6 "${@:2}"
  .venv/bin/python -m jobs.evaluate --output "$output/evaluation-$1" --data "$output/shards" \
    --run "$output/$1"
}

.venv/bin/python -m jobs.preprocess --source "$source" --output "$output/shards" --superpixels 196
for seed in 0 1; do
  train "paper-loss-$seed" --seed "$seed" --target-share 0.55
  other=(--seed "$seed" --warmup-from "$output/paper-loss-$seed" --target-share 0.65)
  train "log-probability-$seed" "${other[@]}" --confusion true-log-probability
done
train frozen-0 --seed 0 --warmup-from "$output/paper-loss-0" --target-share 0.65 \
  --confusion true-log-probability --co-trained none
.venv/bin/python -m jobs.report "$output"/evaluation-{paper-loss,log-probability}-{0,1} \
  "$output/evaluation-frozen-0" --titles paper-loss paper-loss log-probability log-probability \
  frozen --output "$output/report.html"

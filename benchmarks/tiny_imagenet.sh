#!/usr/bin/env bash
# Tiny ImageNet, 200 classes, three seeds: imitation, and the same without it (docs/results.md).
# Warm-up and sampled masks ran on one GPU, imitation and soft masks on two CPU cores.
# Run from the repository's root: benchmarks/tiny_imagenet.sh SOURCE OUTPUT
set -euo pipefail
usage="usage: benchmarks/tiny_imagenet.sh SOURCE OUTPUT"
source=${1:?$usage} output=${2:?$usage}
nets=(--net-width 40 --residual-blocks 1 --bottleneck 384)
gpu=(--workers 1 --device cuda --batch-size 256)
cpu=(--workers 2 --device cpu --precision bfloat16 --epochs 1)

train() { # NAME SHARDS FLAGS...
  .venv/bin/python -m jobs.train --output "$output/$1" --data "$output/$2" "${nets[@]}" \
    --confusion true-logit "${@:3}"
}

evaluate() { # NAME SHARDS FLAGS...
  .venv/bin/python -m jobs.evaluate --output "$output/evaluation-$1" --data "$output/$2" \
    --run "$output/$1" "${@:3}"
}

for superpixels in 196 36; do
  .venv/bin/python -m jobs.preprocess --source "$source" --output "$output/shards-$superpixels" \
    --superpixels "$superpixels"
done
for seed in 0 1 2; do
  same=(--seed "$seed" --warmup-from "$output/warm-$seed")
  train "warm-$seed" shards-196 --seed "$seed" "${gpu[@]}" --min-crop-area 0.3 \
    --warmup-epochs 35 --warmup-rate 2e-3 --epochs 1 --target-share 0.55
  train "imitation-$seed" shards-196 "${same[@]}" "${cpu[@]}" --guide --imitation-weight 30
  train "soft-$seed" shards-36 "${same[@]}" "${cpu[@]}" --target-share 0.55 --no-gumbel-noise
  train "sampled-$seed" shards-196 "${same[@]}" "${gpu[@]}" --epochs 6 --target-share 0.55
  train "paper-loss-$seed" shards-196 "${same[@]}" "${gpu[@]}" --epochs 6 --target-share 0.55 \
    --confusion top # the table has seeds 0 and 1 of it
  evaluate "imitation-$seed" shards-196 --ten-crops
  evaluate "soft-$seed" shards-36
  evaluate "sampled-$seed" shards-196
  evaluate "paper-loss-$seed" shards-196
done
.venv/bin/python -m jobs.report "$output"/evaluation-{imitation,soft,sampled,paper-loss}-{0,1,2} \
  --titles imitation imitation imitation soft soft soft sampled sampled sampled \
  paper-loss paper-loss paper-loss --output "$output/report.html"

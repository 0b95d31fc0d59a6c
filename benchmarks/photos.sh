#!/usr/bin/env bash
# Photographs: nets over EfficientNet-Lite0 at 224 px beside the network's own maps
# (docs/results.md). LIST is made by benchmarks/photo_list.py, or any list of images with boxes.
# Run from the repository's root: benchmarks/photos.sh LIST OUTPUT [SEED...]
set -euo pipefail
usage="usage: benchmarks/photos.sh LIST OUTPUT [SEED...]"
list=${1:?$usage} output=${2:?$usage}
seeds=("${@:3}")
network=(--network efficientnet-lite0)

.venv/bin/python -m jobs.preprocess --source "$list" --output "$output/shards" \
  --image-size 224 --superpixels 196
evaluate=(.venv/bin/python -m jobs.evaluate --data "$output/shards")
"${evaluate[@]}" "${network[@]}" --network-size 320 --rule otsu --output "$output/evaluation-320"
pages=("$output/evaluation-320") titles=(network)
for seed in "${seeds[@]:-0}"; do
  .venv/bin/python -m jobs.train --data "$output/shards" "${network[@]}" --seed "$seed" \
    --output "$output/run-$seed"
  run=("${evaluate[@]}" --run "$output/run-$seed" --no-baselines)
  "${run[@]}" --output "$output/evaluation-$seed"
  "${run[@]}" --accurate --output "$output/accurate-$seed"
  pages+=("$output/evaluation-$seed" "$output/accurate-$seed") titles+=(ALN accurate)
done
.venv/bin/python -m jobs.report "${pages[@]}" --titles "${titles[@]}" --output "$output/report.html"

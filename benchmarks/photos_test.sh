#!/usr/bin/env bash
# Photographs: the nets of benchmarks/photos.sh and the network's own maps on val images that chose
# no setting (docs/results.md). LIST is made by benchmarks/photo_list.py with --parity 1.
# Run from the repository's root: benchmarks/photos_test.sh LIST OUTPUT [SEED...]
set -euo pipefail
usage="usage: benchmarks/photos_test.sh LIST OUTPUT [SEED...]"
list=${1:?$usage} output=${2:?$usage}
seeds=("${@:3}")

.venv/bin/python -m jobs.preprocess --source "$list" --output "$output/test-shards" \
  --image-size 224 --superpixels 196
evaluate=(.venv/bin/python -m jobs.evaluate --data "$output/test-shards")
"${evaluate[@]}" --network efficientnet-lite0 --network-size 320 --rule otsu \
  --output "$output/test-320"
pages=("$output/test-320") titles=(network)
for seed in "${seeds[@]:-0}"; do
  "${evaluate[@]}" --run "$output/run-$seed" --no-baselines --accurate \
    --output "$output/test-$seed"
  pages+=("$output/test-$seed") titles+=(accurate)
done
.venv/bin/python -m jobs.report "${pages[@]}" --titles "${titles[@]}" --output "$output/test.html"

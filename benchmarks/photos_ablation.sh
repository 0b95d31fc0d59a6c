#!/usr/bin/env bash
# Photographs: what imitation, adversarial training and co-training each contribute
# (docs/results.md). OUTPUT is that of benchmarks/photos.sh, with the run of seed 0.
# Run from the repository's root: benchmarks/photos_ablation.sh OUTPUT
set -euo pipefail
output=${1:?usage: benchmarks/photos_ablation.sh OUTPUT}

pages=("$output/accurate-0") titles=("both")
ablate() { # TITLE FLAG...
  .venv/bin/python -m jobs.train --data "$output/shards" --network efficientnet-lite0 \
    --output "$output/run-$1" "${@:2}"
  .venv/bin/python -m jobs.evaluate --data "$output/shards" --run "$output/run-$1" \
    --no-baselines --accurate --output "$output/accurate-$1"
  pages+=("$output/accurate-$1") titles+=("$1")
}
ablate imitation --warmup-epochs 2 --epochs 0
ablate adversarial --imitation-weight 0
ablate frozen --co-trained none
.venv/bin/python -m jobs.report "${pages[@]}" --titles "${titles[@]}" \
  --output "$output/ablation.html"

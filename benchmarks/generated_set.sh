#!/usr/bin/env bash
# The generated set (docs/results.md, "Generated images"): the demo with three seeds; then from the
# warm-up of seed 0 section 3.4 of the paper (a frozen classifier), and imitation of LayerCAM.
# Run from the repository's root: benchmarks/generated_set.sh OUTPUT
set -euo pipefail
output=${1:?usage: benchmarks/generated_set.sh OUTPUT}

train() { # NAME FLAGS...
  .venv/bin/python -m jobs.train --data "$output/shards" --output "$output/$1-0" --seed 0 \
    --workers 2 --warmup-from "$output/run-0" --epochs 10 "${@:2}"
  .venv/bin/python -m jobs.evaluate --data "$output/shards" --run "$output/$1-0" \
    --output "$output/evaluation-$1"
}

for seed in 0 1 2; do
  .venv/bin/python -m jobs.demo --output "$output" --seed "$seed"
done
train frozen --co-trained none
train imitation --guide --imitation-weight 30
.venv/bin/python -m jobs.report "$output"/evaluation-{0,1,2,frozen,imitation} \
  --titles ALN ALN ALN frozen imitation --output "$output/report.html"

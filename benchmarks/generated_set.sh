#!/usr/bin/env bash
# The generated set: the demo with three seeds (docs/results.md, "Generated images").
# Run from the repository's root: benchmarks/generated_set.sh OUTPUT
set -euo pipefail
output=${1:?usage: benchmarks/generated_set.sh OUTPUT}

for seed in 0 1 2; do
  .venv/bin/python -m jobs.demo --output "$output" --seed "$seed"
done
.venv/bin/python -m jobs.report "$output"/evaluation-{0,1,2} --titles ALN ALN ALN \
  --output "$output/report.html"

#!/usr/bin/env bash
# Imitation of LayerCAM on the generated set, where the adversarial loss alone does better.
# Run from the repository's root, after the demo or generated_set.sh wrote DEMO:
# benchmarks/imitation.sh DEMO
set -euo pipefail
demo=${1:?usage: benchmarks/imitation.sh DEMO}
run="$demo/imitation-0" evaluation="$demo/evaluation-imitation-0"

.venv/bin/python -m jobs.train --data "$demo/shards" --output "$run" --seed 0 --workers 2 \
  --warmup-from "$demo/run-0" --epochs 10 --guide --imitation-weight 30
.venv/bin/python -m jobs.evaluate --data "$demo/shards" --run "$run" --output "$evaluation"
.venv/bin/python -m jobs.report "$demo/evaluation-0" "$evaluation" \
  --titles ALN imitation --output "$demo/imitation.html"

#!/usr/bin/env bash
# Section 3.4 of the paper on the generated set: the classifier co-trained and frozen.
# Run from the repository's root, after the demo or generated_set.sh wrote DEMO:
# benchmarks/section_3_4.sh DEMO
set -euo pipefail
demo=${1:?usage: benchmarks/section_3_4.sh DEMO}
run="$demo/frozen-0" evaluation="$demo/evaluation-frozen-0"

.venv/bin/python -m jobs.train --data "$demo/shards" --output "$run" --seed 0 --workers 2 \
  --warmup-from "$demo/run-0" --epochs 10 --co-trained none
.venv/bin/python -m jobs.evaluate --data "$demo/shards" --run "$run" --output "$evaluation"
.venv/bin/python -m jobs.report "$demo/evaluation-0" "$evaluation" \
  --titles co-trained frozen --output "$demo/section_3_4.html"

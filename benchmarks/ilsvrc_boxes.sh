#!/usr/bin/env bash
# Constant boxes on ILSVRC's real val boxes by every protocol (docs/results.md, "The evaluator").
# METADATA is a folder in wsolevaluation's form. Run from the repository's root:
# benchmarks/ilsvrc_boxes.sh METADATA OUTPUT
set -euo pipefail
usage="usage: benchmarks/ilsvrc_boxes.sh METADATA OUTPUT"
metadata=${1:?$usage} output=${2:?$usage}

for protocol in devkit exclusive int224; do
  .venv/bin/python -m jobs.evaluate --ground-truth "$metadata" --protocol "$protocol" \
    --output "$output/$protocol"
done

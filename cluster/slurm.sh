#!/bin/bash
# A Ray cluster within one Slurm allocation, which runs one command and ends with it:
#   sbatch --nodes=4 --gpus-per-node=4 cluster/slurm.sh \
#       python -m jobs.train --data /shared/shards --output /shared/run --workers 16
# Submit from the checkout, which all nodes mount, with its .venv made. At the time limit the
# command writes a checkpoint and the job is queued again, where its partition allows that.
#SBATCH --job-name=aln
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')  # of this job alone

# The first address of this node, the allocation's first; set HEAD_IP where it is not the network's.
address=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
export RAY_ADDRESS="$address:$((20000 + SLURM_JOB_ID % 10000))"
own=(--disable-usage-stats --block --num-cpus="$SLURM_CPUS_ON_NODE")

ray start --head --node-ip-address="$address" --port="${RAY_ADDRESS##*:}" \
    --include-dashboard=false --temp-dir="/tmp/aln-$SLURM_JOB_ID" "${own[@]}" &
until ray health-check > /dev/null 2>&1; do sleep 1; done
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$(hostname -s)" \
        ray start --address="$RAY_ADDRESS" "${own[@]}" &
fi

"$@" &
command=$!
trap 'kill -TERM $command' TERM
code=0
wait $command || code=$?
if ((code == 143)) && kill -0 $command 2> /dev/null; then  # the trap ended the wait
    code=0
    wait $command || code=$?
    ((code == 143)) && scontrol requeue "$SLURM_JOB_ID"
fi
kill $(jobs -p) 2> /dev/null
exit $code

#!/bin/bash
# A Ray cluster within one Slurm allocation, which runs one command and ends with it:
#   sbatch --nodes=4 --gpus-per-node=4 cluster/slurm.sh \
#       python -m jobs.train --data /shared/shards --output /shared/run --workers 16
# Submit from the checkout, which all nodes mount, with its .venv made. At the time limit the
# command writes a checkpoint and the job is queued again, where its partition allows that.
#SBATCH --job-name=aln
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=15  # of Slurm's KillWait, 30 s, for a checkpoint
# Why keepalive: cluster/README.md, a network that is cut.
export RAY_grpc_client_keepalive_time_ms=60000 RAY_grpc_client_keepalive_timeout_ms=20000
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')  # of this job alone

# The first address of this node, the allocation's first; set HEAD_IP where it is not the network's.
address=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
export RAY_ADDRESS="$address:$((20000 + SLURM_JOB_ID % 10000))"
own=(--disable-usage-stats --block --num-cpus="$SLURM_CPUS_ON_NODE")

ray start --head --node-ip-address="$address" --port="${RAY_ADDRESS##*:}" \
    --include-dashboard=false --temp-dir="/tmp/aln-$SLURM_JOB_ID" "${own[@]}" &
head=$!
until ray health-check > /dev/null 2>&1; do
    kill -0 $head || exit 1  # its reason is above
    sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --nodes=$others --ntasks=$others --ntasks-per-node=1 --exclude="$(hostname -s)" \
        ray start --address="$RAY_ADDRESS" "${own[@]}" &
    python - << END || echo "not all hosts joined within 2 minutes; going on without them"
import ray, sys, time
ray.init(logging_level="warning", log_to_driver=False)
end = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) < $SLURM_JOB_NUM_NODES:
    if time.monotonic() > end:
        sys.exit(1)
    time.sleep(1)
END
fi

"$@" &
command=$!
stopped= code=0
trap 'stopped=time; kill -TERM $command' USR1  # the time limit is near
trap 'stopped=user; kill -TERM $command' TERM  # scancel
wait $command || code=$?
if [[ $stopped ]]; then  # which ended the wait
    code=0
    wait $command || code=$?
fi
# Ray ends before the job does: queued again, it could meet itself on this host.
trap '' USR1 TERM
kill $(jobs -p) 2> /dev/null || true
wait || true
if [[ $stopped == time ]] && ((code > 128)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code

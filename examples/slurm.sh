#!/bin/bash
# A preset on SLURM, on one node or several, that goes on after preemption and after its time limit:
#
#     sbatch examples/slurm.sh --preset openai-l14-dcr --out /shared/runs
#     sbatch --nodes 4 examples/slurm.sh --preset openai-l14-dcr --out /shared/runs
#
# The arguments are those of `diva-lab train`. The runs' folder has to be seen by all nodes. Before its end SLURM sends
# SIGTERM; each process finishes its step, the run is saved, and the command exits with 130: then the job is put into
# the queue again, and goes on to the same bits. A job that is cancelled, or ends with another fault, stays ended.
#
#SBATCH --job-name=diva-lab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[ ! -f .venv/bin/activate ] || . .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

trap : TERM  # preemption sends it to this script too, which has to outlive its processes
status=0
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m diva_lab train "$@"' diva-lab "$@" || status=$?
if [ "$status" -eq 130 ] && ! scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q JobState=CANCELLED; then
    echo "stopped and saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

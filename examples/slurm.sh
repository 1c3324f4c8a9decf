#!/bin/bash
# Train on several machines of a SLURM cluster:
#   sbatch examples/slurm.sh --questions qa.tsv --passages wiki.parquet --output_dir my-rag
# Submit it from the repository, with the environment of the README active. The repository, the data, and --output_dir must
# be on a disk that all machines share. The arguments are settings of train.py. If the time limit ends a job, submit it again
# with the same arguments: it resumes.
#SBATCH --job-name=cozyrag
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=cozyrag-%j.log
set -euo pipefail

export CONFIG=${CONFIG:-accelerate_configs/multi_node.yaml}
export PER_NODE=${PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # processes of each machine, one per GPU
MACHINES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN=${MACHINES%%$'\n'*} # the first; a pipe into head could close before scontrol has written all names, and end the job
export MAIN PORT=${PORT:-$((29500 + SLURM_JOB_ID % 1000))}

# One task per machine; accelerate starts its processes. SLURM_NODEID is known only inside srun, hence the quotes.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PER_NODE))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN" --main_process_port "$PORT" train.py "$@"' bash "$@"

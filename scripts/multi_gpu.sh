#!/usr/bin/env bash
# Runs on all GPUs of one machine.
#
#   scripts/multi_gpu.sh --config=configs/nyud.py:vit_l16 --workdir=runs/nyud --config.batch_size=8
#   PROCESSES=8 scripts/multi_gpu.sh ...     # one process per GPU, if one process cannot read the images fast enough
#   DRY_RUN=1 scripts/multi_gpu.sh ...       # or --dry-run as the first argument: prints the commands, runs nothing
#
# PROCESSES  number of processes; default 1: one process drives all GPUs. Must divide GPUS.
# GPUS       number of GPUs; default: those that nvidia-smi lists.
# PORT       port of process 0 for the others; default: a free one.
#
# With config.mesh.fsdp, XLA_FLAGS=--xla_gpu_enable_pipelined_all_gather=true overlaps gathers with matmuls
# (docs/scaling.md); the gain has not been measured.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
PROCESSES=${PROCESSES:-1}
program=(.venv/bin/python main.py "$@")

run() { # COMMAND...: runs the command, or prints it
    if [[ ${DRY_RUN:-0} != 0 ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

if ((PROCESSES == 1)); then
    run "${program[@]}"
    exit
fi

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
if ((GPUS % PROCESSES)); then
    echo "error: PROCESSES=$PROCESSES must divide the number of GPUs, $GPUS" >&2
    exit 2
fi
each=$((GPUS / PROCESSES))
PORT=${PORT:-$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

started=()

# shellcheck disable=SC2329 # the trap calls it
stop() { # ends the processes of this script: SIGTERM, and SIGKILL after a minute
    kill "${started[@]}" 2>/dev/null || return 0
    for ((second = 0; second < 60; second++)); do
        kill -0 "${started[@]}" 2>/dev/null || return 0
        sleep 1
    done
    kill -KILL "${started[@]}" 2>/dev/null || true
}
trap stop EXIT # also after Ctrl-C, which does not reach background processes
trap 'exit 130' INT TERM

for ((index = 0; index < PROCESSES; index++)); do
    # Each process sees only its own GPUs: 0,1 the first, 2,3 the second.
    devices=$(seq -s, $((index * each)) $((index * each + each - 1)))
    run env "CUDA_VISIBLE_DEVICES=$devices" "${program[@]}" \
        "--coordinator=127.0.0.1:$PORT" "--num_processes=$PROCESSES" "--process_id=$index" &
    started+=($!)
    if [[ ${DRY_RUN:-0} != 0 ]]; then wait "$!"; fi # keeps the lines in order
done

# If one fails, the others exit by themselves (taskexpert_jax/parallel/distributed.py); if one is killed, stop them.
status=0
for process in "${started[@]}"; do
    wait "$process" || { status=$?; break; }
done
exit "$status"

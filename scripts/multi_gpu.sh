#!/usr/bin/env bash
# A run on all GPUs of one machine.
#
#   scripts/multi_gpu.sh --config=configs/nyud.py:vit_l16 --workdir=runs/nyud --config.batch_size=8
#   PROCESSES=8 scripts/multi_gpu.sh ...     # one process a GPU, where one process cannot read the images fast enough
#   DRY_RUN=1 scripts/multi_gpu.sh ...       # or --dry-run as the first argument: prints, runs nothing
#
# PROCESSES  how many; the default, 1, is the simplest: one program drives all GPUs. It divides GPUS.
# GPUS       how many GPUs; default: those that nvidia-smi lists.
# PORT       where process 0 listens for the others; default: a free one.
#
# With config.mesh.fsdp, XLA_FLAGS=--xla_gpu_enable_pipelined_all_gather=true hides what is gathered behind products:
# docs/scaling.md. What it gains has not been measured.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
PROCESSES=${PROCESSES:-1}
program=(.venv/bin/python main.py "$@")

run() { # COMMAND...: runs it, or prints it
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

stop() { # ends the processes that this script has started: asked first, made to after a minute
    kill "${started[@]}" 2>/dev/null || return 0
    for ((second = 0; second < 60; second++)); do
        kill -0 "${started[@]}" 2>/dev/null || return 0
        sleep 1
    done
    kill -KILL "${started[@]}" 2>/dev/null || true
}
trap stop EXIT # also after Ctrl-C, which does not reach processes in the background
trap 'exit 130' INT TERM

for ((index = 0; index < PROCESSES; index++)); do
    # Each process sees its own GPUs alone: 0,1 the first, 2,3 the second.
    devices=$(seq -s, $((index * each)) $((index * each + each - 1)))
    run env "CUDA_VISIBLE_DEVICES=$devices" "${program[@]}" \
        "--coordinator=127.0.0.1:$PORT" "--num_processes=$PROCESSES" "--process_id=$index" &
    started+=($!)
    if [[ ${DRY_RUN:-0} != 0 ]]; then wait "$!"; fi # the lines in order
done

# Where one fails the others end by themselves (taskexpert_jax/parallel/distributed.py); a killed one says nothing, so stop them.
status=0
for process in "${started[@]}"; do
    wait "$process" || { status=$?; break; }
done
exit "$status"

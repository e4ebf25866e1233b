#!/usr/bin/env bash
# Starts a run on every worker of a Cloud TPU VM that exists; main.py finds the other workers by itself.
# scripts/tpu_queued.sh also requests the TPU, installs the program and restarts after a preemption.
#
#   TPU=my-pod ZONE=europe-west4-b scripts/tpu_pod.sh --config=configs/nyud.py:vit_l16 --workdir=gs://BUCKET/runs/nyud \
#     --config.dataset.data_dir=gs://BUCKET/data --config.mesh.fsdp=8 --config.batch_size=32
#   DRY_RUN=1 TPU=... ZONE=... scripts/tpu_pod.sh ...      # or --dry-run as the first argument: prints the command, runs nothing
#
# Required on every worker: the checkout in the same folder, with `make venv` and the extras `tpu` and `gcs`. The workdir is
# in a bucket, or in a file system that all workers mount at the same path.
set -euo pipefail

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ -z ${TPU:-} || -z ${ZONE:-} ]]; then
    echo "error: give the TPU's name and zone: TPU=NAME ZONE=ZONE scripts/tpu_pod.sh --config=..." >&2
    exit 2
fi
FOLDER=${FOLDER:-TaskExpert-JAX} # the checkout on the workers, relative to the home directory or absolute

# Quoted again, because the command passes through a shell on the worker: --config.tasks="('semseg','depth')" must survive.
command="cd $(printf '%q' "$FOLDER") && .venv/bin/python main.py$(printf ' %q' "$@")"

# --worker=all: each worker drives its own chips, so all must run the program; ssh ends when the last one does.
launch=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" --worker=all "--command=$command")

if [[ ${DRY_RUN:-0} != 0 ]]; then
    printf '%q ' "${launch[@]}" && echo
else
    exec "${launch[@]}"
fi

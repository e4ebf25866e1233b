#!/usr/bin/env bash
# Starts a run on every worker of a Cloud TPU pod slice; main.py finds the other workers by itself.
#
#   TPU=my-pod ZONE=europe-west4-b scripts/tpu_pod.sh --config=configs/nyud.py:vit_l16 --workdir=/mnt/runs/nyud \
#     --config.dataset.data_dir=/mnt/data --config.mesh.fsdp=8 --config.batch_size=32
#   DRY_RUN=1 TPU=... ZONE=... scripts/tpu_pod.sh ...      # or --dry-run as the first argument: prints the command, runs nothing
#
# Required on every worker: the checkout in the same folder, with `make venv` and the extra `tpu`, and a shared file
# system for the workdir (Filestore, or a bucket mounted with gcsfuse) at the same path.
set -euo pipefail

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
: "${TPU:?give the name of the TPU VM: TPU=NAME ZONE=ZONE scripts/tpu_pod.sh --config=...}"
: "${ZONE:?give its zone: ZONE=europe-west4-b}"
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

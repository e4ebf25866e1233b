#!/usr/bin/env bash
# Starts a run on every worker of a Cloud TPU pod slice; on a TPU VM, main.py finds the other workers by itself.
#
#   TPU=my-pod ZONE=europe-west4-b scripts/tpu_pod.sh --config=configs/nyud.py:vit_l16 --workdir=/mnt/runs/nyud \
#     --config.dataset.data_dir=/mnt/data --config.mesh.fsdp=8 --config.batch_size=32
#   DRY_RUN=1 TPU=... ZONE=... scripts/tpu_pod.sh ...      # or --dry-run as the first argument: prints, runs nothing
#
# Beforehand: the checkout with `make venv` and requirements-tpu.txt in the same folder of every worker, and one file
# system (Filestore, or a bucket mounted with gcsfuse) at the same place on all of them for the workdir.
set -euo pipefail

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
: "${TPU:?give the name of the TPU VM: TPU=NAME ZONE=ZONE scripts/tpu_pod.sh --config=...}"
: "${ZONE:?give its zone: ZONE=europe-west4-b}"
FOLDER=${FOLDER:-TaskExpert-JAX} # the checkout on the workers, from the home directory or from /

# Quoted once more: the command passes through a shell on the worker, and --config.tasks="('semseg','depth')" must survive.
command="cd $(printf '%q' "$FOLDER") && .venv/bin/python main.py$(printf ' %q' "$@")"

# --worker=all: each worker drives its own chips, so all must run the same program; ssh ends when the last one does.
launch=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" --worker=all "--command=$command")

if [[ ${DRY_RUN:-0} != 0 ]]; then
    printf '%q ' "${launch[@]}" && echo
else
    exec "${launch[@]}"
fi

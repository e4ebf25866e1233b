#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine, as a JobSet (scripts/gke_jobset.yaml) or with XPK.
#
#   export NAME=nyud IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/taskexpert ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4
#   scripts/gke.sh apply gs://BUCKET/runs/nyud --config=nyud:vit_l16 --config.dataset.data_dir=gs://BUCKET/data
#
#   scripts/gke.sh manifest RUN FLAG...   # prints the JobSet for `taskexpert train RUN FLAG...`
#   scripts/gke.sh apply RUN FLAG...      # kubectl applies it; it restarts until the run is finished
#   scripts/gke.sh logs                   # what process 0 prints
#   scripts/gke.sh delete                 # SIGTERM: the run saves a checkpoint and ends
#   CLUSTER=NAME TPU_TYPE=v5litepod-16 scripts/gke.sh xpk RUN FLAG...    # the same with XPK, which makes its own manifest
#
# --dry-run before the command, or DRY_RUN=1, prints what would be run and runs nothing.
#
# NAME, IMAGE      of the JobSet; of the container (Dockerfile, with EXTRAS=tpu,gcs).
# ACCELERATOR      tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, tpu-v4-podslice: the node label gke-tpu-accelerator.
# TOPOLOGY         chips of a slice along each axis: 4x4, 2x2x4.
# CHIPS_PER_HOST   chips of a node; default 4.
# SLICES           number of slices; default 1. Several are one run (docs/several_hosts.md).
# SPOT=1           on Spot nodes.
# KUBERNETES_SERVICE_ACCOUNT      whose permissions the run has; default: default.
# RESTARTS         restarts after failures other than preemptions with a saved checkpoint; default 10.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { # LINE
    echo "error: $1" >&2
    exit 2
}

run() { # COMMAND...: runs the command, or prints it
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '%q ' "$@" && echo
        return
    fi
    command -v "$1" >/dev/null || fail "$1 is missing: install it"
    "$@"
}

number() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 must be a whole number from 1"
}

needed() { # NAME...
    local variable
    for variable in "$@"; do
        [[ -n ${!variable:-} ]] || fail "give $variable=...; the head of scripts/gke.sh explains it"
    done
}

in_bucket() { # RUN
    [[ ${1:-} == gs://[a-z0-9]* ]] || fail "the run must be in a bucket, because the pods share no disk: gs://BUCKET/RUN --config=..."
}

fill() { # WORD VALUE: in the text of manifest()
    text=${text//@$1@/"$2"}
}

manifest() { # RUN FLAG...
    in_bucket "$@"
    needed NAME IMAGE ACCELERATOR TOPOLOGY
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "NAME=$NAME must have up to 40 lower-case letters, digits and hyphens"
    [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "TOPOLOGY=$TOPOLOGY must be chips along each axis, such as 4x4 or 2x2x4"
    local per_host=${CHIPS_PER_HOST:-4} chips=$((${TOPOLOGY//x/*})) arguments="" argument text
    number CHIPS_PER_HOST "$per_host"
    number SLICES "${SLICES:=1}"
    [[ ${SPOT:=0} == [01] ]] || fail "SPOT=$SPOT must be 0 or 1"
    number RESTARTS "${RESTARTS:=10}"
    ((chips > per_host)) || per_host=$chips
    ((chips % per_host == 0)) || fail "CHIPS_PER_HOST=$per_host must divide the $chips chips of TOPOLOGY=$TOPOLOGY"
    # In YAML a quote within quotes is doubled; in Kubernetes $(NAME) would be a variable, and $$ is a dollar.
    for argument in train "$@" --preempted_status=143; do
        [[ $argument != *$'\n'* ]] || fail "an argument has a line break"
        argument=${argument//\'/\'\'}
        arguments+="${arguments:+, }'${argument//\$/\$\$}'"
    done
    text=$(<scripts/gke_jobset.yaml)
    [[ ${SPOT:-0} != 0 ]] || text=$(grep -v '# Spot$' <<<"$text")
    fill NAME "$NAME"
    fill IMAGE "$IMAGE"
    fill ACCELERATOR "$ACCELERATOR"
    fill TOPOLOGY "$TOPOLOGY"
    fill KUBERNETES_SERVICE_ACCOUNT "${KUBERNETES_SERVICE_ACCOUNT:-default}"
    fill SLICES "$SLICES"
    fill HOSTS $((chips / per_host))
    fill CHIPS "$per_host"
    fill RESTARTS "$RESTARTS"
    fill ARGUMENTS "[$arguments]" # last: its text may have such words too
    echo "$text"
}

apply() { # RUN FLAG...
    local text
    text=$(manifest "$@")
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        printf "kubectl apply --filename=- <<'EOF'\n%s\nEOF\n" "$text"
    else
        run kubectl apply --filename=- <<<"$text"
    fi
}

logs() {
    needed NAME
    local first="jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,$first"
}

delete() {
    needed NAME
    run kubectl delete jobset "$NAME"
}

xpk() { # RUN FLAG...
    in_bucket "$@"
    needed CLUSTER NAME IMAGE TPU_TYPE
    number SLICES "${SLICES:-1}"
    number RESTARTS "${RESTARTS:-10}"
    # XPK restarts after statuses from 127 on, such as 143 after a preemption; 1 is that of the processes that lost another one,
    # 2 that of a start while the lease of a killed run is still valid. XPK signals its subshell: exec makes that the program.
    run xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$TPU_TYPE" "--num-slices=${SLICES:-1}" \
        "--docker-image=$IMAGE" "--max-restarts=${RESTARTS:-10}" --restart-on-exit-codes=1,2 \
        --termination-grace-period-seconds=300 \
        "--command=exec taskexpert train$(printf ' %q' "$@") --preempted_status=143"
}

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
[[ ${1:-} =~ ^(manifest|apply|logs|delete|xpk)$ ]] ||
    fail "which command? scripts/gke.sh [--dry-run] manifest|apply|logs|delete|xpk"
[[ ! $1 =~ ^(logs|delete)$ || $# == 1 ]] || fail "$1 takes no argument (the JobSet is that of NAME=...): $2" # else another one is deleted
"$@"

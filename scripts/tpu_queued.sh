#!/usr/bin/env bash
# Trains on a Cloud TPU that is requested as a queued resource. After a preemption it requests another one and resumes.
#
#   export TPU=my-tpu ZONE=us-west4-a ACCELERATOR=v5litepod-16 SPOT=1
#   scripts/tpu_queued.sh run gs://BUCKET/runs/nyud --config=nyud:vit_l16 --config.dataset.data_dir=gs://BUCKET/data
#
#   scripts/tpu_queued.sh create       # requests the TPU and waits for it
#   scripts/tpu_queued.sh install      # builds a wheel of this checkout, installs it on all workers
#   scripts/tpu_queued.sh run RUN ...  # create, install, `taskexpert train RUN ...` on all workers; again until RUN is finished
#   scripts/tpu_queued.sh status       # what became of the request
#   scripts/tpu_queued.sh stop         # SIGTERM on all workers: the run saves a checkpoint and ends
#   scripts/tpu_queued.sh delete       # deletes the request and its TPU VMs
#
# --dry-run before the command, or DRY_RUN=1, prints the commands and runs nothing.
#
# TPU, ZONE        name of the request (and of its TPU VM), zone.
# ACCELERATOR      v5litepod-16, v6e-8, v5p-8, v4-8, ...
# SPOT=1           Spot: cheaper, and may be preempted at any time.
# SLICES           number of slices; default 1. Several are one run (docs/several_hosts.md).
# VALID_UNTIL      give up if there is no TPU after this time: 6h; default: wait.
# SERVICE_ACCOUNT  whose permissions the workers have; default: Compute Engine's.
# RUNTIME          image of the TPU VMs; default: the one for the accelerator.
# CREATE_FLAGS     further flags of `gcloud compute tpus queued-resources create`, such as "--network=NET --internal-ips".
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { # LINE [STATUS]
    echo "error: $1" >&2
    exit "${2:-2}"
}

run() { # COMMAND...: runs the command, or prints it
    if [[ ${DRY_RUN:-0} != 0 ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

queued() { # VERB ARGUMENT...
    run gcloud compute tpus queued-resources "$@" "--zone=$ZONE"
}

state() { # of the request: ACTIVE, WAITING_FOR_RESOURCES, ..., or MISSING
    local answer attempt
    for attempt in 1 2 3 4 5; do
        if answer=$(gcloud compute tpus queued-resources describe "$TPU" "--zone=$ZONE" '--format=value(state.state)' 2>&1); then
            echo "${answer##*$'\n'}"
            return
        fi
        if [[ $answer == *NOT_FOUND* ]]; then
            echo MISSING
            return
        fi
        if [[ $answer == *"Error parsing"* ]]; then break; fi # such as no project; asking again does not help
        ((attempt == 5)) || sleep "$POLL_SECONDS"
    done
    fail "the state of $TPU in $ZONE is unknown: $(tr -s '[:space:]' ' ' <<<"$answer" | sed 's, $,,')" 1
}

request() {
    local flags=("--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME") more
    if ((SLICES > 1)); then flags+=("--node-count=$SLICES" "--node-prefix=$TPU"); else flags+=("--node-id=$TPU"); fi
    if [[ ${SPOT:-0} != 0 ]]; then flags+=(--spot); fi
    if [[ -n ${VALID_UNTIL:-} ]]; then flags+=("--valid-until-duration=$VALID_UNTIL"); fi
    if [[ -n ${SERVICE_ACCOUNT:-} ]]; then flags+=("--service-account=$SERVICE_ACCOUNT"); fi
    read -ra more <<<"${CREATE_FLAGS:-}"
    queued create "$TPU" "${flags[@]}" "${more[@]}"
}

delete() {
    queued delete "$TPU" --force --quiet
}

create() { # requests the TPU if there is none, and waits until it is active
    local now before=""
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        request
        queued describe "$TPU" '--format=value(state.state)'
        return
    fi
    while :; do
        now=$(state)
        [[ $now == "$before" ]] || echo "$(date +%T) $TPU: $now" >&2
        before=$now
        case $now in
            ACTIVE) return ;;
            MISSING) request ;;
            SUSPENDED) delete ;; # preempted: its VMs are gone, and it does not become active again
            FAILED) fail "the request $TPU failed; the command status says why, delete removes it" 1 ;;
            *) sleep "$POLL_SECONDS" ;;
        esac
    done
}

wheel() { # builds what `install` copies: once a run, so that a restart has the code of the start
    run rm -rf .cache/tpu
    run mkdir -p .cache/tpu/taskexpert
    run "${PYTHON:-.venv/bin/python}" -m pip wheel --quiet --no-deps --wheel-dir=.cache/tpu/taskexpert .
    run cp requirements.lock scripts/tpu_worker.sh .cache/tpu/taskexpert
}

on_workers() { # COMMAND, for the shells of all workers, at the same time
    queued ssh "$TPU" "--command=$1" --node=all --worker=all --batch-size=all
}

install() {
    queued scp .cache/tpu/taskexpert "$TPU:" --recurse --node=all --worker=all --batch-size=all &&
        on_workers "bash taskexpert/tpu_worker.sh install"
}

settled() { # state after a failure: within some minutes a preempted request is no longer ACTIVE
    local now attempt
    for attempt in 1 2 3 4 5 6; do
        now=$(state)
        [[ $now == ACTIVE ]] || break
        ((attempt == 6)) || sleep "$POLL_SECONDS"
    done
    echo "$now"
}

train() { # RUN FLAG...
    local command failures=0 begin status
    [[ ${1:-} == gs://[a-z0-9]* ]] || fail "the run must be in a bucket, because the workers share no disk: run gs://BUCKET/RUN --config=..."
    # Quoted again, because the command passes through a shell on the workers: --config.tasks="('semseg','depth')" must survive.
    command="bash taskexpert/tpu_worker.sh run$(printf ' %q' "$@")"
    wheel
    while :; do
        create
        begin=$SECONDS status=0
        { install && on_workers "$command"; } || status=$?
        if [[ ${DRY_RUN:-0} != 0 ]]; then
            echo "# after a preemption:"
            delete
            return
        fi
        if ((status == 0)); then
            echo "finished: $1; $TPU is still there, and is paid for: scripts/tpu_queued.sh delete"
            return
        fi
        case $(settled) in
            ACTIVE)
                if ((status == 143)) && on_workers "bash taskexpert/tpu_worker.sh stopped"; then
                    fail "stopped; the same command resumes" 143
                fi
                ((status != 2)) || fail "the program refused to run, see above; $TPU is still there" 2
                ((SECONDS - begin < 3600)) || failures=0
                ((++failures < 3)) || fail "failed $failures times in a row, last with status $status; $TPU is still there" "$status"
                ;;
            MISSING | DELETING) fail "$TPU was deleted; the same command requests it again and resumes" 1 ;;
            *) failures=0 ;;
        esac
        echo "$(date +%T) $TPU: status $status; restarting" >&2
    done
}

if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
[[ ${1:-} =~ ^(create|install|run|status|stop|delete)$ ]] ||
    fail "which command? scripts/tpu_queued.sh [--dry-run] create|install|run|status|stop|delete"
[[ $1 == run || $# == 1 ]] || fail "$1 takes no argument (the TPU is that of TPU=NAME): $2" # else it might delete another one
[[ -n ${TPU:-} && -n ${ZONE:-} ]] || fail "give the TPU's name and zone: TPU=NAME ZONE=ZONE scripts/tpu_queued.sh $1"
POLL_SECONDS=${POLL_SECONDS:-30} # between two looks at the request
SLICES=${SLICES:-1}
if [[ $1 == create || $1 == run ]]; then
    case ${ACCELERATOR:=} in
        v6e-*) image=v2-alpha-tpuv6e ;;
        v5p-*) image=v2-alpha-tpuv5 ;;
        v5litepod-*) image=v2-alpha-tpuv5-lite ;;
        v[234]-*) image=tpu-ubuntu2204-base ;;
        *) image=${RUNTIME:-} ;;
    esac
    [[ -n $ACCELERATOR ]] || fail "give the accelerator: ACCELERATOR=v5litepod-16"
    RUNTIME=${RUNTIME:-$image}
    [[ -n $RUNTIME ]] || fail "no image is known for ACCELERATOR=$ACCELERATOR: give RUNTIME=IMAGE, or v5litepod-16, v6e-8, v5p-8, v4-8, ..."
    [[ ${SPOT:=0} == [01] ]] || fail "SPOT=$SPOT must be 0 or 1"
    [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES must be a whole number from 1"
fi
[[ ${DRY_RUN:-0} != 0 ]] || command -v gcloud >/dev/null || fail "gcloud is missing: install the Google Cloud CLI"

case $1 in
    run)
        trap 'echo "interrupted; a run on the workers goes on: scripts/tpu_queued.sh stop ends it" >&2; exit 130' INT TERM
        train "${@:2}"
        ;;
    install) wheel && install ;;
    status) queued describe "$TPU" ;;
    stop) on_workers "bash taskexpert/tpu_worker.sh stop" ;;
    *) "$1" ;;
esac

#!/usr/bin/env bash
# Installs, runs and stops the program on one worker of a TPU. scripts/tpu_queued.sh copies it to ~/taskexpert of every worker.
#
#   tpu_worker.sh install             # the wheel of this folder with the extras tpu and gcs, into .venv
#   tpu_worker.sh run ARGUMENT...     # taskexpert train ARGUMENT...; status 143 after SIGTERM
#   tpu_worker.sh stop                # SIGTERM: the run saves a checkpoint; returns when it has ended
#   tpu_worker.sh stopped             # status 0 if the last run was stopped by `stop`, not by the machine's end
set -euo pipefail
cd "$(dirname "$0")"

running() { # whether the process of run.pid is the program; another one may have its number after a reboot
    [[ -e run.pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$(<run.pid)/cmdline" | grep -q 'taskexpert train'
}

stop() {
    touch stopped
    running || return 0
    echo "$(hostname): stopping process $(<run.pid), which saves a checkpoint" >&2
    kill "$(<run.pid)"
    for ((second = 0; second < ${STOP_SECONDS:-300}; second++)); do
        running || return 0
        sleep 1
    done
    kill -KILL "$(<run.pid)"
}

stopped() {
    [[ -e stopped ]]
}

install() {
    stop
    if [[ ! -x .venv/bin/pip ]]; then
        # The images of TPU VMs have Python 3.10; uv brings a newer one.
        PATH=$PATH:$HOME/.local/bin
        command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
        uv venv --quiet --seed --python=3.12 .venv
    fi
    wheels=(./*.whl)
    .venv/bin/pip install --quiet --constraint=requirements.lock "${wheels[0]}[tpu,gcs]"
    .venv/bin/pip install --quiet --no-deps --force-reinstall "${wheels[0]}" # its version may be that of the last one
    rm ./*.whl
}

run() {
    if running; then
        echo "error: $(hostname): process $(<run.pid) is training already; scripts/tpu_queued.sh stop ends it" >&2
        exit 1
    fi
    rm -f stopped
    echo $$ >run.pid
    exec .venv/bin/taskexpert train "$@" --preempted_status=143
}

command=$1
shift
"$command" "$@"

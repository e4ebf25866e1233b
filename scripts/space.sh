#!/usr/bin/env bash
# Fills a folder for a Hugging Face Space that serves the page of a model: scripts/space.sh RUN DIR
#
# DIR must be empty or missing. It gets the package as a wheel, the pinned versions, the model without its optimiser state,
# a Dockerfile and the README with the Space's settings; push it to a Space of the type Docker. docs/serve.md says more.
set -euo pipefail

if [[ $# != 2 ]]; then
    echo "usage: scripts/space.sh RUN DIR" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
run=$1 space=$2 python=${PYTHON:-$root/.venv/bin/python}

if [[ -e $space && ! -d $space ]] || [[ -n $(ls -A "$space" 2>/dev/null) ]]; then
    echo "error: $space is not empty: give another folder" >&2
    exit 2
fi
mkdir -p "$space"
"$python" -m taskexpert_jax.release "$run" --output="$space/model"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir="$space" "$root"
cp "$root/requirements.lock" "$root/scripts/space/Dockerfile" "$root/scripts/space/README.md" "$space/"
echo "written: $space"

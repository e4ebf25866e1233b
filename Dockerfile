# NVIDIA GPUs, or Cloud TPU.
#
#   docker build --tag=taskexpert .
#   docker run --rm --gpus=all --user="$(id -u):$(id -g)" --volume="$PWD:/work" taskexpert \
#     train --config=nyud:vit_l16 --workdir=runs/nyud --config.dataset.data_dir=data
#
#   docker build --build-arg=EXTRAS=tpu,gcs --tag=IMAGE . && docker push IMAGE      # for scripts/gke.sh
#
# The packages for GPUs bring CUDA 13; the host needs the NVIDIA driver (580 or newer) and the NVIDIA Container Toolkit.

# In an image with git, because the wheel records the commit.
FROM python:3.12 AS build
COPY . /source
RUN pip wheel --no-deps --wheel-dir=/wheels /source

FROM python:3.12-slim
ARG EXTRAS=cuda,gcs
COPY requirements.lock /
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --constraint=/requirements.lock "$(echo /wheels/*.whl)[${EXTRAS}]"
# Any user may write there: Numba and Matplotlib keep caches in the home directory.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["taskexpert"]

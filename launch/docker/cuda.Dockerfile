# The project and its environment for NVIDIA GPUs; the host has a driver for CUDA 13 and the NVIDIA Container Toolkit.
# From the repository root:
#     docker build -f launch/docker/cuda.Dockerfile -t beitv2:cuda .
#     docker run --rm --gpus=all --shm-size=8g -v "$PWD/runs:/runs" beitv2:cuda \
#         --config=configs/quickstart.py:smoke --workdir=/runs/smoke
FROM python:3.12-slim

# CUDA itself comes with the wheels of jax; this asks the host for its driver
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/beitv2_jax
# launch/venv.sh takes the image's own Python for the environment
ENV VENV=/usr/local EXTRAS=cuda PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY setup.py pyproject.toml ./
COPY launch launch
COPY configs configs
COPY beitv2_jax beitv2_jax
RUN . launch/venv.sh

# local.sh becomes the program by `exec`, so that it is the one that SIGTERM reaches
ENTRYPOINT ["sh", "launch/local.sh"]

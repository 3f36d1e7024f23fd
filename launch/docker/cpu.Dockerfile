# The project and its environment for CPUs. From the repository root:
#     docker build -f launch/docker/cpu.Dockerfile -t beitv2:cpu .
#     docker run --rm -v "$PWD/runs:/runs" beitv2:cpu --config=configs/quickstart.py:smoke --workdir=/runs/smoke
FROM python:3.12-slim

WORKDIR /opt/beitv2_jax
# launch/venv.sh takes the image's own Python for the environment
ENV VENV=/usr/local PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY setup.py pyproject.toml ./
COPY launch launch
COPY configs configs
COPY beitv2_jax beitv2_jax
RUN . launch/venv.sh

# local.sh becomes the program by `exec`, so that it is the one that SIGTERM reaches
ENTRYPOINT ["sh", "launch/local.sh"]

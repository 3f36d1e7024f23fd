#!/bin/sh
# Prepare a set of images on an Apache Flink cluster; all its machines see the same files. --dry-run prints the command:
#     MASTER=flink-host:8081 IMAGE=registry/beitv2-beam sh launch/beam/flink.sh \
#         --input='/shared/tars/*.tar' --name=imagenet22k --data_dir=/shared/tfds
# IMAGE is a container of apache/beam_python3.11_sdk with this project installed, WORKERS the parallelism (default 32).
. "$(dirname "$0")/common.sh"
need MASTER flink-host:8081
need IMAGE registry/beitv2-beam
prepare_in beam --runner=FlinkRunner --flink_master="$MASTER" --parallelism="${WORKERS:-32}" \
    --environment_type=DOCKER --environment_config="$IMAGE" "$@"

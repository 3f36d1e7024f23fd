#!/bin/sh
# Prepare a set of images on this machine, in WORKERS processes (default: one a core); --dry-run prints the command:
#     sh launch/beam/local.sh --input='/tars/*.tar' --name=imagenet22k --data_dir=/data
. "$(dirname "$0")/common.sh"
prepare_in beam "$@" --runner=DirectRunner --direct_running_mode=multi_processing \
    --direct_num_workers="${WORKERS:-$(getconf _NPROCESSORS_ONLN)}"

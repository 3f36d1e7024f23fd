#!/bin/sh
# Prepare a set of images on Google Cloud Dataflow, from a bucket to a bucket; --dry-run prints the command:
#     PROJECT=my-project REGION=us-central1 TEMP=gs://bucket/tmp sh launch/beam/dataflow.sh \
#         --input='gs://bucket/tars/*.tar' --name=imagenet22k --data_dir=gs://bucket/tfds
# WORKERS is the most workers it may start (default 100), MACHINE their type; further arguments go to Beam.
. "$(dirname "$0")/common.sh"
need PROJECT my-project
need REGION us-central1
need TEMP gs://bucket/tmp
# the workers install the project from here; a worker holds a shard of up to 1 GiB for every thread it runs
prepare_in dataflow --runner=DataflowRunner --project="$PROJECT" --region="$REGION" --temp_location="$TEMP" \
    --job_name="prepare-images-$(date +%Y%m%d-%H%M%S)" --setup_file=./setup.py \
    --requirements_file=launch/beam/dataflow_requirements.txt --max_num_workers="${WORKERS:-100}" \
    --machine_type="${MACHINE:-n2-highmem-4}" --number_of_worker_harness_threads=4 "$@"

#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU slice. Not yet run.
#
#   TPU=my-v5e-256 ZONE=us-west4-a BUCKET=gs://my-bucket bash docs/launchers/tpu_pod.sh
#
# Several slices: create them as one multislice resource and run the same command on all hosts; the
# data axis of the mesh then spans the slices, so that only gradients cross between them.
set -euo pipefail

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_every_host "git clone https://github.com/YOU/fd_jax && cd fd_jax && python3.11 -m venv .venv &&
  .venv/bin/pip install -c constraints.txt '.[train,tpu]'"

# The libraries ask the machine who its peers are; --distributed is all they need to be told.
on_every_host "cd fd_jax && .venv/bin/python train.py --distributed \
  --config=configs/distill_clip_vit_b16.py \
  --config.teacher.path=$BUCKET/teachers/openai_clip_vit_b16 \
  --config.data.data_dir=$BUCKET/tfds --workdir=$BUCKET/runs/clip_b16"

#!/usr/bin/env bash
# Installs fd_jax on every host of a Cloud TPU slice and starts training there. Not yet run.
#
#   TPU=my-v5e-256 ZONE=us-west4-a BUCKET=gs://my-bucket bash docs/launchers/tpu_pod.sh
#
# For several slices, create them as one multislice resource and run the same command on all hosts.
# The data axis of the mesh then spans the slices, so only gradients cross between them.
set -euo pipefail

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_every_host "git clone https://github.com/YOU/fd_jax && cd fd_jax && python3.11 -m venv .venv &&
  .venv/bin/pip install -c constraints/py311.txt '.[train,tpu]'"

# The libraries ask the machine for its peers, so --distributed is all that they need.
on_every_host "cd fd_jax && .venv/bin/python train.py --distributed \
  --config=configs/distill_clip_vit_b16.py \
  --config.teacher.path=$BUCKET/teachers/openai_clip_vit_b16 \
  --config.data.data_dir=$BUCKET/tfds --workdir=$BUCKET/runs/clip_b16"

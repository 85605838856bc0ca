#!/usr/bin/env bash
# array_record 0.8.6: a reader of a file that was cut off, or that is no ArrayRecord file, is made
# without an error and says that the file has 0 records. The error comes when it is closed.
#
# The data source of TFDS does not ask a file for its length, so it hands out a dataset of the length
# in dataset_info.json, and the error appears in the middle of an epoch. fd_jax/data/shards.py opens
# and closes each shard at the start.
#
# Observed: whole 100   cut: made without an error, 0 records, RuntimeError when closed
# Needs array_record; set PYTHON to an interpreter that has it.
set -euo pipefail
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$PYTHON" - "$folder" <<'PY'
import pathlib
import sys

from array_record.python import array_record_module

folder = pathlib.Path(sys.argv[1])
writer = array_record_module.ArrayRecordWriter(str(folder / "whole"), "group_size:1")
for number in range(100):
    writer.write(bytes([number]) * 5000)
writer.close()
data = (folder / "whole").read_bytes()
(folder / "cut").write_bytes(data[: len(data) // 2])

reader = array_record_module.ArrayRecordReader(str(folder / "whole"))
print("whole", reader.num_records())
reader.close()

reader = array_record_module.ArrayRecordReader(str(folder / "cut"))
print("cut: made without an error,", reader.num_records(), "records,", end=" ")
try:
    reader.close()
    print("closed without an error")
except RuntimeError:
    print("RuntimeError when closed")
PY

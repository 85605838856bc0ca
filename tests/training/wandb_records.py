"""What a run logged to Weights & Biases offline, by wandb's own reader."""

import json
import subprocess
import sys


def parts(workdir):
    """The records of each part of a run, oldest first."""
    return [
        [
            json.loads(line)
            for line in subprocess.run(
                [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()
        ]
        for folder in sorted((workdir / "wandb").glob("offline-run-*"))
    ]


def of_kind(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


def rows(records):
    """The rows that a run logged, without those of wandb itself."""
    return [
        {name: value for name, value in row["item"].items() if not name.startswith("_")}
        for row in of_kind(records, "history")
    ]

"""Writes a report on a finished run of train.py or finetune.py.

    python -m fd_jax.report --workdir=runs/quickstart

WORKDIR/report receives report.html, one file that opens offline, and the same as report.md. Both
show the settings, the curves, the rates and the last evaluation. The report of a distillation run
also has the agreement with the teacher before and after training, on held-out and on training
images, and the feature maps of teacher and student in colour. With --wandb, the pictures are added
to the run that the training logged to Weights & Biases.
"""

from collections.abc import Sequence
import sys

from etils import epath

from fd_jax import console, report, storage
from fd_jax.errors import UserError
from fd_jax.training import tracking


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    parser = console.parser("python -m fd_jax.report", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="workdir of a finished run, local or gs://"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="add the pictures to the run in Weights & Biases"
    )
    args = parser.parse_args(argv)
    try:
        if args.wandb:
            tracking.check()
            tracking.check_tracked(epath.Path(args.workdir))
        console.open_devices()
        with storage.one_message(args.workdir):
            folder = report.write_report(args.workdir)
            print(report.summary(folder))
            if args.wandb:
                report.track(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

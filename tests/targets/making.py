"""Targets of a tiny teacher for some digits, made by the command itself."""

from fd_jax.targets import cli

COUNT, VIEWS, SEED = 44, 2, 3  # no multiple of a shard or a batch
SPLIT = f"train[:{COUNT}]"
SHARD = 20


def make(teacher, data, output, *flags):
    """Runs the command; returns its exit status."""
    common = (f"--teacher={teacher}", "--data=digits", f"--split={SPLIT}", f"--data_dir={data}")
    shape = (f"--views={VIEWS}", f"--seed={SEED}", f"--shard_size={SHARD}", "--batch_size=16")
    views = ("--min_area=0.3", "--threads=2")
    return cli.main([*common, *shape, *views, f"--output={output}", *flags])


def fields(data, targets="", **changes):
    """The fields of a run on the same pictures and views."""
    return {
        "teacher.path": "nowhere",
        "teacher.targets": str(targets),
        "data.name": "digits",
        "data.data_dir": data,
        "data.split": SPLIT,
        "data.eval_split": "test[:16]",
        "data.min_area": 0.3,
        "seed": SEED,
        "profile_steps": 0,
        **changes,
    }

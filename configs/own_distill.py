r"""Distil a model folder into a student on your own pictures, with or without classes.

    python train.py --config=configs/own_distill.py:data=my/pictures,teacher=teachers/NAME \
      --workdir=runs/mine

The values follow from the pictures and the teacher: docs/your_own_data.md#rules.
"""

from configs import base, own


def get_config(arg: str = ""):
    """See configs/base.py for the fields.

    Arguments: data=FOLDER_OR_TFDS_NAME, teacher=MODEL_FOLDER, and those of docs/your_own_data.md.
    """
    given = own.arguments(arg, teacher="", student="same")
    found = own.pictures(given)
    teacher, size = own.network(given, "teacher")
    config = base.distillation(teacher="", drop_path=0.1)
    config.teacher.update(path=given["teacher"], source=teacher.source, image_size=size)
    family, arch = own.student(given["student"], teacher, size)
    config.student = {"family": family, "arch": arch, "drop_path": 0.1}
    config.eval.keep_best = "loss" if found.fields["eval_split"] else ""
    return own.fit(config, given, found, size=size, rate=1.2e-3, epochs=300, steps=100_000)

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
    teacher_size = size
    if own.is_folder(given["student"]):
        first, size = own.network(given, "student")
        teacher_size = size // first.stride * teacher.stride  # for the grid of the student
        config.student = {**config.student, "family": "", "arch": {}, "init_from": given["student"]}
    else:
        family, arch = own.student(given["student"], teacher, size)
        config.student = {**config.student, "family": family, "arch": arch}
    config.teacher.update(path=given["teacher"], source=teacher.source, image_size=teacher_size)
    config.eval.keep_best = "loss" if found.fields["eval_split"] else ""
    return own.fit(config, given, found, size=size, rate=1.2e-3, epochs=300, steps=100_000)

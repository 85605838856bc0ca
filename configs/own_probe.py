r"""Train a linear classifier on a frozen model folder, on your own pictures.

    python finetune.py --config=configs/own_probe.py:data=my/pictures,init_from=teachers/NAME \
      --workdir=runs/mine_probed

The pictures have a sub-folder for each class. The values follow from them and the network:
docs/your_own_data.md#rules.
"""

from configs import base, own


def get_config(arg: str = ""):
    """See configs/base.py for the fields.

    Arguments: data=FOLDER_OR_TFDS_NAME, init_from=MODEL_FOLDER, and those of docs/your_own_data.md.
    """
    given = own.arguments(arg, init_from="")
    found = own.labelled(given)
    network, size = own.network(given, "init_from")
    pooling = "cls" if network.arch.get("cls_token") else "mean"
    final_norm = network.arch.get("final_norm", True)
    config = base.linear_probe(epochs=90, pooling=pooling, final_norm=final_norm)
    config.init_from, config.model.classes = given["init_from"], found.classes
    config.eval.keep_best = "top1"
    config.optim.name = "adamw"  # the rates of LARS are for thousands of steps of thousands
    return own.fit(config, given, found, size=size, rate=3e-3, epochs=90, steps=20_000, batch=1024)

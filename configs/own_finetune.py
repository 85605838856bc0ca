r"""Fine-tune a model folder on your own pictures, with a sub-folder for each class.

    python finetune.py --config=configs/own_finetune.py:data=my/pictures,init_from=runs/mine/model \
      --workdir=runs/mine_finetuned

The values follow from the pictures and the network: docs/your_own_data.md#rules.
"""

from configs import base, own


def get_config(arg: str = ""):
    """See configs/base.py for the fields.

    Arguments: data=FOLDER_OR_TFDS_NAME, init_from=MODEL_FOLDER, and those of docs/your_own_data.md.
    """
    given = own.arguments(arg, init_from="")
    found = own.labelled(given)
    network, size = own.network(given, "init_from")
    recipe = base.swin_fine_tuning if own.is_swin(network) else base.fine_tuning
    layer_decay, rate = (0.65, 1.8e-3) if network.arch.get("depth", 0) <= 12 else (0.75, 3.5e-4)
    if "depths" in network.arch:
        layer_decay = 0.8
    config = recipe(drop_path=0.1, layer_decay=layer_decay, peak_lr=1.0, floor_lr=0.0)
    if found.count < own.FEW:
        config.mixing.update(mixup=0.0, cutmix=0.0, erasing=0.0)
        config.data.min_area = 0.35
    if network.arch.get("lift"):  # which is of the tokens after the norm
        config.model.update(final_norm=True, pooling="mean")
    config.init_from, config.model.classes = given["init_from"], found.classes
    config.eval.keep_best = "top1"
    return own.fit(config, given, found, size=size, rate=rate, epochs=100, steps=20_000)

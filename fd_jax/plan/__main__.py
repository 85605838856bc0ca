r"""Plans a run on TPUs ahead of time, without the chips: its memory and upper bounds of its speed.

    python -m fd_jax.plan --config=configs/distill_clip_vit_b16.py --topology=v5e:16x16
    python -m fd_jax.plan --config=configs/finetune_clip_vit_b16.py --topology=v4:4x4x4 \
      --start=configs/distill_clip_vit_b16.py --config.batch_size=4096 --output=plan.json

The real train step is compiled, without weights or data, which takes some minutes; --effort=-1 is a
quick look. The plan of the config is printed and written first. If the run does not fit, settings
with which it does are looked for, each on top of those that helped; Ctrl-C ends that at any time.
Needs the extra "plan".
"""

from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import config_flags

from fd_jax import console
from fd_jax.cli import application, config_flag
from fd_jax.console import say
from fd_jax.errors import ConfigError, UserError
from fd_jax.plan import planning, stopping, topology

COMMAND = "python -m fd_jax.plan"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the experiment, configs/NAME.py."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU type and shape of the slice, such as v5e:4x4."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the plan to.")
_HLO = flags.DEFINE_string("hlo", None, "File to write the text of the compiled program to.")
_START = flags.DEFINE_string(
    "start",
    "",
    "What init_from would hold: a converter source, or the config that distils the student.",
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", None, "Images in an epoch, if the dataset is unknown here.", lower_bound=1
)
_EFFORT = flags.DEFINE_float(
    "effort",
    0.0,
    "Compiler effort, -1 to 0; -1 takes a fraction of the time and gives no estimate of speed.",
    lower_bound=-1.0,
    upper_bound=0.0,
)
_WINDOWED = flags.DEFINE_bool(
    "windowed_einsum",
    False,
    "Compile sharded matmuls as loops, as real runs do; the counts are then too low.",
)
_ADVICE = flags.DEFINE_bool(
    "advice",
    None,
    "If the step does not fit, look for settings that do. Default: yes, unless --effort is -1.",
)


def main(argv: Sequence[str]) -> int:
    """Plans one run. Returns 0 if it fits into memory, else 1."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}; flags begin with --")
    for flag in (_CONFIG, _TOPOLOGY):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing; see {console.called(COMMAND)} --help")
    config = config_flag.read(_CONFIG)
    output, hlo_file = _file(_OUTPUT), _file(_HLO)
    assert _TOPOLOGY.value is not None
    advise = _EFFORT.value > -1 if _ADVICE.value is None else _ADVICE.value
    with stopping.at_once():
        target = topology.describe(_TOPOLOGY.value)
        stopping.handle_signals()  # libtpu has set handlers of its own
        planner = planning.Planner(
            target=target,
            effort=_EFFORT.value,
            windowed_einsum=_WINDOWED.value,
            start=_START.value,
            examples=_EXAMPLES.value,
            output=output,
        )
        plan = planner.plan(config, advise=advise, hlo_file=hlo_file)
    if not plan["fits"] and not advise:
        say("--advice looks for settings that fit")
    return 0 if plan["fits"] else 1


def run() -> None:
    """The console script `fd-jax-plan`."""
    about = __doc__ or ""
    application.run_app(main, about=about.replace(COMMAND, console.called(COMMAND)))


def _file(flag: flags.FlagHolder) -> epath.Path | None:
    """The output file of a flag, checked before anything is compiled."""
    if flag.value is None:
        return None
    path = epath.Path(flag.value)
    if not path.parent.is_dir():
        raise ConfigError(f"--{flag.name}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"--{flag.name}={path} is a folder; name a file in it")
    return path


if __name__ == "__main__":
    run()

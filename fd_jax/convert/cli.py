"""The commands of `convert_checkpoints.py`."""

import argparse
from collections.abc import Sequence
import os
import sys
import time
from typing import NoReturn

from absl import logging
import jax

from fd_jax import console, storage
from fd_jax.convert import exporting, importing, inspecting, listing, verifying
from fd_jax.convert.formats import FORMATS
from fd_jax.convert.rules.names import summarize
from fd_jax.errors import ConversionError, UserError
from fd_jax.models import sizes

ABOUT = """Weights of public models in and out of fd_jax model folders.

    {name} import --input=FOLDER_OF_TRANSFORMERS_OR_TIMM --output=teachers/mine
    {name} import --source=dino_vitb16 \\
        --input=dino_vitbase16_pretrain.pth --output=teachers/dino_vitb16
    {name} sources

`{name} COMMAND --help` lists the flags of a command. docs/conversion.md says
how each source was verified."""


def run_as_script(name: str) -> NoReturn:
    """Runs the command of `sys.argv` and exits."""
    # For a process that does nothing else. `main` prints the one message: Orbax also logs what it
    # raises, with a traceback, and a write that fails (a full disk) leaves callbacks behind.
    sys.unraisablehook = lambda _: None
    logging.set_verbosity(logging.FATAL)
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerators to others
    sys.exit(main(name=name))


def main(argv: Sequence[str] | None = None, *, name: str = "convert_checkpoints.py") -> int:
    """Runs one command; a mistake of the user becomes one message and the status 2."""
    arguments = _parser(name).parse_args(argv)
    try:
        with storage.one_message(getattr(arguments, "output", "")):
            arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was at the output before is unchanged", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`head`, say) has seen enough
        console.discard_output()
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = console.parser(name, ABOUT.format(name=name))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("sources", help="list what can be read and written")
    command.set_defaults(
        run=lambda _: print(
            listing.style_table(), listing.source_table(), listing.format_table(), sep="\n\n"
        )
    )

    command = commands.add_parser("inspect", help="show what a file or model folder holds")
    command.add_argument("--input", required=True, type=_path, help="any weights file or folder")
    command.set_defaults(run=lambda a: print(inspecting.inspect(a.input)))

    command = commands.add_parser("import", help="turn a file into a model folder")
    command.add_argument(
        "--source",
        default=importing.AUTO,
        help="a name from `sources`; auto (the default) takes the one that fits",
    )
    command.add_argument(
        "--input", required=True, type=_path, help="the file, or a folder of transformers or timm"
    )
    _add_facts(command)
    command.add_argument("--output", required=True, type=_path, help="model folder to write")
    command.add_argument("--part", help="which network of a file that holds several")
    command.add_argument(
        "--image-size", help="resize positions for an input of SIDE or HEIGHTxWIDTH pixels"
    )
    command.add_argument(
        "--dtype", default="float32", choices=importing.STORED_DTYPES, help="to store"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    command.add_argument(
        "--allow-other-hash", action="store_true", help="take a file with another SHA-256"
    )
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="write a model folder for another library")
    command.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    command.add_argument("--input", required=True, type=_path, help="model folder")
    command.add_argument(
        "--output", required=True, type=_path, help="file, or folder for huggingface and timm"
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.set_defaults(run=_export)

    command = commands.add_parser("verify", help="compare a model folder with torch, by block")
    command.add_argument("--source", default=importing.AUTO, help="source of the file")
    command.add_argument("--input", required=True, type=_path, help="the file")
    _add_facts(command)
    command.add_argument("--model", required=True, type=_path, help="the model folder made from it")
    command.add_argument("--part", help="which network of a file that holds several")
    command.add_argument(
        "--allow-other-hash", action="store_true", help="take a file with another SHA-256"
    )
    command.set_defaults(run=_verify)
    return parser


def _add_facts(command: argparse.ArgumentParser) -> None:
    """The flags that state what no tensor of a file tells."""
    command.add_argument(
        "--arch", help="name of the published network, as timm or open_clip say it, or of a source"
    )
    command.add_argument(
        "--fact",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a fact that no tensor tells, such as heads=12; it overrules what files beside the "
        "weights say; may be repeated",
    )


class _Progress:
    """Reports the progress of a long command on the error stream, every few seconds."""

    EVERY = 5.0  # seconds

    def __init__(self):
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self.EVERY:
            self._last = time.monotonic()
            print(f"{what} {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)


# Shells do not expand the "~" of --input=~/file.
_path = os.path.expanduser


def _export(arguments: argparse.Namespace) -> None:
    written = exporting.export(
        arguments.format, arguments.input, arguments.output, overwrite=arguments.overwrite
    )
    if written.left:
        trained = any(name.startswith("projector/") for name in written.left)
        why = " (only distillation uses a projector)" if trained else ""
        print(f"the format has no place for {', '.join(summarize(written.left))}{why}")
    print(*written.remarks, f"wrote {arguments.output}", sep="\n")


def _verify(arguments: argparse.Namespace) -> None:
    compared = verifying.verify(
        arguments.source,
        arguments.input,
        arguments.model,
        part=arguments.part,
        allow_other_hash=arguments.allow_other_hash,
        arch=arguments.arch,
        facts=arguments.fact,
    )
    print(verifying.report(compared))
    if not compared.agrees:
        raise ConversionError(f"the features differ by more than {verifying.TOLERANCE:g}")


def _import(arguments: argparse.Namespace) -> None:
    result = importing.import_file(
        arguments.source,
        arguments.input,
        arguments.output,
        part=arguments.part,
        image_size=None if arguments.image_size is None else sizes.parse(arguments.image_size),
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        allow_other_hash=arguments.allow_other_hash,
        arch=arguments.arch,
        facts=arguments.fact,
        progress=_Progress(),
    )
    print(listing.import_report(result))
    print(f"wrote {arguments.output}")

"""Hugging Face's hub: names of repositories, and the folders of its cache."""

import json
from pathlib import Path

from fd_jax.errors import ConversionError

NAME = "hf-hub:"  # how timm and open_clip begin the name of a repository
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "open_clip_model.safetensors",
)
_PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*.bin",
    "open_clip_pytorch_model.bin",
)
_CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")


def fetch(name: str) -> Path:
    """The folder of a repository, from the cache of huggingface_hub if it is there.

    Args:
      name: "hf-hub:ORG/NAME" or "hf-hub:ORG/NAME@REVISION".

    Raises:
      ConversionError: huggingface_hub is missing, or the repository cannot be had: it does not
        exist, asks for a licence to be accepted, or there is no network. Tokens are those of
        huggingface_hub.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConversionError(
            f"{name}: repositories of the hub need huggingface_hub; pip install huggingface_hub, "
            f"or name a local file ({error})"
        ) from error
    repository, _, revision = name.removeprefix(NAME).partition("@")
    asked = {"repo_id": repository, "revision": revision or None}
    try:
        cached = _cached(hub, errors, asked)
        return cached if cached is not None else _download(hub, asked)
    except errors.GatedRepoError as error:
        raise ConversionError(
            f"{name}: its authors ask for their conditions to be accepted. Accept them on "
            f"https://huggingface.co/{repository} and log in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise ConversionError(
            f"{name}: expected {NAME}ORG/NAME or {NAME}ORG/NAME@REVISION"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ConversionError(
            f"{name}: there is no such repository or revision, or it is private and you are not "
            "logged in (`hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{name}: not in the cache of huggingface_hub, and it cannot be fetched ({why:.120}). "
            "Connect to the network, or fetch the repository elsewhere and name its folder"
        ) from error


def _cached(hub, errors, asked: dict[str, str | None]) -> Path | None:
    """The folder in the cache, if whole weights and a config are in it."""
    try:
        folder = Path(hub.snapshot_download(**asked, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
    whole = _holds(folder, _CONFIGS) and _holds(folder, (*_WEIGHTS, *_PICKLES))
    return folder if whole and _shards_are_there(folder) else None


def _shards_are_there(folder: Path) -> bool:
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            return False
        if not all((folder / str(shard)).exists() for shard in shards):
            return False
    return True


def _download(hub, asked: dict[str, str | None]) -> Path:
    """Fetches the configs and the weights, as safetensors if the repository has them."""
    folder = Path(hub.snapshot_download(**asked, allow_patterns=[*_CONFIGS, *_WEIGHTS]))
    if _holds(folder, _WEIGHTS):
        return folder
    return Path(hub.snapshot_download(**asked, allow_patterns=[*_CONFIGS, *_PICKLES]))


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def snapshot(path: Path) -> Path:
    """The one version inside a repository of the cache; other folders as they are.

    Args:
      path: a folder: of a repository ("models--ORG--NAME"), or of its snapshots.

    Raises:
      ConversionError: several versions are there, or the folder is that of the whole cache.
    """
    if any(path.glob("models--*/snapshots")):
        names = sorted(folder.name for folder in path.glob("models--*"))
        raise ConversionError(
            f"{path}: the whole cache of huggingface_hub; name one of its folders: "
            f"{', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
        )
    repository = path.parent if path.name == "snapshots" else path
    main = repository / "refs" / "main"
    if main.is_file():
        name = main.read_bytes()[:100].decode(errors="replace").strip()
        version = repository / "snapshots" / Path(name).name
        return version if version.is_dir() else path
    versions = sorted(p for p in (repository / "snapshots").glob("*") if p.is_dir())
    if len(versions) > 1:
        raise ConversionError(
            f"{path} holds {len(versions)} versions; name one of "
            f"{', '.join(str(version) for version in versions[:4])}"
        )
    return versions[0] if versions else path

"""Recognises files that fd_jax does not read, by their first bytes, and says what to do."""

from pathlib import Path

HEAD = 512  # bytes that `hint` wants to see; the mark of a tar archive is at 257

_UNPACK = "unpack it first: "
# (offset, bytes there, what it is, what to do); the first that fits counts.
_MARKS = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull`"),
    (0, b"\x1f\x8b", "compressed with gzip", f"{_UNPACK}gunzip --keep {{path}}"),
    (0, b"BZh", "compressed with bzip2", f"{_UNPACK}bunzip2 --keep {{path}}"),
    (0, b"\xfd7zXZ\x00", "compressed with xz", f"{_UNPACK}unxz --keep {{path}}"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", f"{_UNPACK}unzstd {{path}}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"{_UNPACK}7z x {{path}}"),
    (257, b"ustar", "a tar archive", f"{_UNPACK}tar -xf {{path}}, then name the file inside"),
    (
        0,
        b"\x89HDF",
        "an HDF5 file (Keras)",
        "convert a PyTorch or safetensors file of this network",
    ),
    (0, b"GGUF", "a GGUF file, quantised for inference", "convert the file it was made from"),
    (4, b"TFL3", "a TensorFlow Lite file", "convert the file it was made from"),
    (0, b"\x93NUMPY", "a single numpy array", "a network is an .npz archive of named arrays"),
    *(
        (0, start, "a web page or XML: the download failed", "fetch the file itself")
        for start in (b"<!", b"<h", b"<H", b"<?")
    ),
    (0, b"{", "JSON text, not weights", "name the weights, or the folder they are in"),
)
_SUFFIXES = (
    (".stablehlo", "a network exported for serving", "export the model folder it was made from"),
    (".msgpack", "a Flax msgpack file", "save its parameters with numpy.savez"),
    (".ckpt.index", "a TensorFlow checkpoint", "save its variables with numpy.savez"),
)
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".onnx")
_LISTED = 6


def hint(path: Path, head: bytes) -> str | None:
    """What the file is and what to do, or None for one of no known kind."""
    for offset, mark, what, remedy in _MARKS:
        if head[offset:].startswith(mark):
            return f"{what}; {remedy.format(path=path)}"
    for suffix, what, remedy in _SUFFIXES:
        if path.name.endswith(suffix):
            return f"{what}; {remedy}"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return (
            "a Python pickle that torch.save did not write; loading it would run what is in "
            "it. Save its arrays with torch.save, safetensors or numpy.savez where you trust it"
        )
    return None


def folder_hint(path: Path) -> str:
    """What to name instead of a folder that holds no Hugging Face model."""
    if (path / "model.json").exists():
        return "it is a model folder already: `inspect` shows it, `export` writes other formats"
    if (path / "model" / "model.json").exists():
        return f"the model folder of this run is {path / 'model'}"
    if (path / ".metadata").exists() and any(path.glob("*.distcp")):
        return (
            "it is a distributed checkpoint of PyTorch; make one file of it with `python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth`"
        )
    inside = sorted(p.name for p in path.iterdir() if p.name.endswith(_WEIGHTS))
    if not inside:
        return "it holds no weights file"
    more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
    return f"name one of the files in it: {', '.join(inside[:_LISTED])}{more}"

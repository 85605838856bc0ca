"""The commands as a user runs them."""

import dataclasses
import hashlib
from pathlib import Path
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from fd_jax import checkpoint, model_folder
from fd_jax.convert import cli, families, formats, importing, listing, verifying
from fd_jax.convert.trees import flat
from fd_jax.errors import ConfigError, ConversionError, ModelFolderError
from tests.convert import synthetic

ROOT = Path(__file__).parents[2]
NAME = "fd_official_distilled_clip_vit_b"


@pytest.fixture
def small(monkeypatch):
    """Sources of shrunk files in the place of the real ones."""
    for name in synthetic.names():
        monkeypatch.setitem(families.SOURCES, name, synthetic.small_source(name))


@pytest.fixture
def weights(small, tmp_path):
    """A shrunk file of the official distillation."""
    given = synthetic.structure(NAME)
    return synthetic.write(given, synthetic.values(given), tmp_path)


def run(*arguments):
    """Runs a command in this process; returns its status."""
    return cli.main([str(argument) for argument in arguments])


def test_import_says_what_it_read_dropped_and_resized(weights, tmp_path, capsys):
    output = tmp_path / "model"
    status = run("import", "--source", NAME, "--input", weights, "--output", output)
    out = capsys.readouterr().out
    assert status == 0
    assert f"as {NAME}" in out
    assert "dropped 62 tensors, the frozen teacher (take it with --part=teacher)" in out
    assert "beside the weights: optimizer/state/0/step" in out
    status = run(
        *("import", "--source", NAME, "--input", weights, "--output", output),
        *("--overwrite", "--image-size", 20),
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "resized encoder/rel_pos_bias/table from [28, 2] to [84, 2] (geometric)" in out
    assert model_folder.load_spec(output).arch["image_size"] == 20
    again = ("import", "--source", NAME, "--input", weights, "--output", output, "--overwrite")
    assert run(*again, "--image-size", "20x40") == 0
    assert model_folder.load_spec(output).arch["image_size"] == [20, 40]
    assert run(*again, "--image-size", "20:40") == 2
    assert "'20:40': expected a number as 224, or HEIGHTxWIDTH" in capsys.readouterr().err


def test_import_with_part_takes_the_teacher_of_a_distillation_checkpoint(weights, tmp_path, capsys):
    output = tmp_path / "model"
    common = ("import", "--source", NAME, "--input", weights, "--output", output)
    assert run(*common, "--part", "decoder") == 2
    assert "has no part 'decoder'; expected one of student, teacher" in capsys.readouterr().err
    assert run(*common, "--part", "teacher") == 0
    spec = model_folder.load_spec(output)
    assert spec.source == f"{NAME}:teacher" and spec.arch["ln_pre"]


def test_an_existing_folder_is_never_overwritten_unasked(weights, tmp_path, capsys):
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    assert run("import", "--source", NAME, "--input", weights, "--output", output) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert [p.name for p in output.iterdir()] == ["mine.txt"]
    model = tmp_path / "other"
    assert run("import", "--source", NAME, "--input", weights, "--output", model) == 0
    (tmp_path / "t.safetensors").write_text("precious")
    export = (
        "export",
        "--format",
        "safetensors",
        "--input",
        model,
        "--output",
        tmp_path / "t.safetensors",
    )
    assert run(*export) == 2
    assert (tmp_path / "t.safetensors").read_text() == "precious"
    assert run(*export, "--overwrite") == 0


def test_overwriting_replaces_nothing_but_what_was_written_before(weights, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    model, exported = tmp_path / "model", tmp_path / "exported"
    imported = ("import", "--source", NAME, "--input", weights, "--overwrite", "--output")
    assert run(*imported, mine) == 2
    assert "mine is not a model folder, so it is not overwritten" in capsys.readouterr().err
    assert run(*imported, model) == run(*imported, model) == 0
    export = ("export", "--input", model, "--overwrite", "--output")
    assert run(*export, mine, "--format", "huggingface") == 2
    assert run(*export, mine, "--format", "timm") == 2
    assert "mine is no timm folder" in capsys.readouterr().err
    assert run(*export, mine, "--format", "source") == 2
    assert run(*export, model, "--format", "huggingface") == 2
    assert "model is no Hugging Face folder" in capsys.readouterr().err
    for layout in ("huggingface", "timm", "huggingface"):
        assert run(*export, exported, "--format", layout) == 0
    assert (mine / "thesis.tex").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "model", "exported", "model.pth"}


def test_what_cannot_be_written_is_one_error_and_leaves_nothing(weights, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    common = ("import", "--source", NAME, "--input", weights, "--output")
    assert run(*common, tmp_path / "file" / "model") == 2
    assert "file/model: cannot be written" in capsys.readouterr().err
    assert run(*common, tmp_path / "model") == 0
    export = ("export", "--input", tmp_path / "model", "--format", "timm", "--output")
    assert run(*export, tmp_path / "file" / "x") == 2
    assert "file/x: cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_one_error(weights, tmp_path, monkeypatch):
    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", full)
    with pytest.raises(ConversionError, match="model: cannot be written .No space left"):
        importing.import_file(NAME, weights, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth"]


def test_damage_found_while_writing_is_one_error_and_no_folder(weights, tmp_path, monkeypatch):
    """Large tensors are read only when their turn to be written comes."""
    monkeypatch.setattr(importing, "_LAZY_SIZE", 1)
    data = bytearray(weights.read_bytes())
    name = "encoder.blocks.1.mlp.fc2.weight"
    given = synthetic.structure(NAME)
    data[data.index(synthetic.values(given)["model"][name].tobytes())] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConversionError, match="model.pth: damaged .* does not match its checksum"):
        importing.import_file(NAME, weights, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth"]


def test_a_tilde_in_a_path_is_the_home_folder(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("import", "--source", NAME, "--input=~/model.pth", "--output=~/model") == 0
    assert (tmp_path / "model" / "model.json").exists()


def test_import_of_a_single_shard_asks_for_the_folder(weights, tmp_path):
    import torch

    shard = tmp_path / "pytorch_model-00001-of-00002.bin"
    torch.save({"model": {"encoder.cls_token": torch.zeros(1, 1, 32)}}, shard)
    with pytest.raises(ConversionError, match="one of several shards: name the folder"):
        importing.read(NAME, shard)


def test_export_of_a_file_and_import_of_a_model_folder_are_refused(weights, tmp_path, capsys):
    export = ("export", "--format", "timm", "--output", tmp_path / "x", "--input")
    assert run(*export, weights) == 2
    assert "`import` makes a model folder of it" in capsys.readouterr().err
    importing.import_file(NAME, weights, tmp_path / "model")
    with pytest.raises(ConversionError, match="it is a model folder already"):
        importing.read(NAME, tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "dino_vitb16"}, f"the file fits .*{NAME}"),
        ({"source": "dino"}, "no source is named 'dino'; expected one of"),
        ({"image_size": 0}, "image_size 0 is less than patch_size 4"),
        ({"image_size": -4}, "image_size -4 is less than patch_size 4"),
        ({"image_size": 1 << 20}, "image size 1048576; expected at most"),
        ({"image_size": 13}, "image_size 13 is not divisible by patch_size 4"),
        ({"dtype": "int8"}, "dtype 'int8'; expected one of float32"),
    ],
)
def test_wrong_requests_are_one_clear_error(changes, message, weights, tmp_path):
    arguments = {"source": NAME, **changes}
    with pytest.raises((ConversionError, ConfigError), match=message):
        importing.import_file(path=weights, output=tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


def test_inspect_shows_everything_and_which_sources_fit(weights, capsys):
    assert run("inspect", "--input", weights) == 0
    out = capsys.readouterr().out
    assert "torch zip" in out
    assert "model/encoder.blocks.*.attn.qkv.weight float32[96, 32] x 2" in out
    assert "float16: " in out and "bytes" in out
    assert "config: yacs.config.CfgNode" in out
    assert f"{NAME}: fits completely" in out
    assert f"{NAME} --part=teacher: fits completely" in out


def test_inspect_reads_a_model_folder(weights, tmp_path, capsys):
    importing.import_file(NAME, weights, tmp_path / "model")
    assert run("inspect", "--input", tmp_path / "model") == 0
    out = capsys.readouterr().out
    assert "fd_jax model folder" in out and '"source_sha256"' in out
    assert "encoder/rel_pos_bias/table float32[28, 2]" in out


@pytest.mark.parametrize("damaged", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"garbage")])
def test_a_damaged_model_folder_is_one_error(damaged, change, weights, tmp_path, capsys):
    importing.import_file(NAME, weights, tmp_path / "model")
    change(tmp_path / "model" / "params" / damaged)
    export = ("export", "--format", "timm", "--output", tmp_path / "x", "--input")
    assert run(*export, tmp_path / "model") == 2
    assert f"the weights in {tmp_path}/model cannot be read" in capsys.readouterr().err
    if damaged == "_METADATA":  # arrays are described apart from their values
        assert run("inspect", "--input", tmp_path / "model") == 2
        assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "openai_clip_vit_b16",
        "deit_base_patch16_224",
        "dinov2_vitb14_reg4",
        "dinov3_vitb16_hf",
        "siglip2_base_patch16_224_hf",
        "siglip2_base_patch16_224_bigvision",
        NAME,
        "timm_beit_base_patch16_224",
        "swin_base_patch4_window7_224_hf",
        "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
    ],
)
def test_verify_compares_every_block_with_torch(name, small, tmp_path, capsys):
    given = synthetic.structure(name)
    path = synthetic.write(given, synthetic.values(given), tmp_path)
    importing.import_file(name, path, tmp_path / "model")
    arguments = ("verify", "--source", name, "--input", path, "--model", tmp_path / "model")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "bit for bit" in out and "block 1" in out
    assert ("block 4" in out) == ("swin" in name)  # blocks of all stages
    assert ("tensors as they stand in the file" in out) == name.endswith("_hf")
    assert ("final norm" in out) == (name != "timm_beit_base_patch16_224")


@pytest.mark.parametrize("dtype", importing.STORED_DTYPES)
def test_verify_agrees_in_every_stored_dtype(dtype, small, tmp_path):
    """A network of half precision differs from its file, but not from the rounded file."""
    name = "dinov2_vitb14_hf"
    given = synthetic.structure(name)
    path = synthetic.write(given, synthetic.values(given), tmp_path)
    importing.import_file(name, path, tmp_path / "model", dtype=dtype, image_size=12)
    assert verifying.verify(name, path, tmp_path / "model").agrees


def test_verify_knows_the_part_of_the_model_folder(weights, tmp_path):
    importing.import_file(NAME, weights, tmp_path / "model", part="teacher")
    assert verifying.verify(NAME, weights, tmp_path / "model").agrees


def test_verify_sees_another_file_and_another_network(weights, tmp_path, capsys):
    spec, params = (result := importing.read(NAME, weights)).spec, result.params
    changed = {**params, "projector": {**params["projector"]}}
    changed["projector"]["bias"] = params["projector"]["bias"] + np.float32(1e-3)
    model_folder.save(tmp_path / "model", spec, changed)
    arguments = ("verify", "--source", NAME, "--input", weights, "--model", tmp_path / "model")
    assert run(*arguments) == 2
    assert "does not hold the parameters of the file: projector/bias" in capsys.readouterr().err
    rows = [("block 0", 2e-4, 1.0)]
    assert not verifying.Compared(1, 0, rows).agrees


def test_verify_sees_a_wrong_table_of_a_hugging_face_file(small, tmp_path, monkeypatch):
    """A Hugging Face file's tensors reach the reference by name: a swapped rule cannot hide."""
    name = "dinov2_vitb14_hf"
    given = synthetic.structure(name)
    path = synthetic.write(given, synthetic.values(given), tmp_path)
    source = families.SOURCES[name]
    part = source.parts["backbone"]
    swap = {"norm1": "norm2", "norm2": "norm1"}
    rules = tuple(
        dataclasses.replace(rule, names=re.sub("norm[12]", lambda m: swap[m[0]], rule.names))
        if isinstance(rule.names, str)
        else rule
        for rule in part.table.rules
    )
    wrong = dataclasses.replace(part, table=dataclasses.replace(part.table, rules=rules))
    monkeypatch.setitem(
        families.SOURCES, name, dataclasses.replace(source, parts={"backbone": wrong})
    )
    importing.import_file(name, path, tmp_path / "model")
    compared = verifying.verify(name, path, tmp_path / "model")
    assert compared.untouched == 43 and not compared.agrees


def test_sources_prints_the_tables_of_the_docs(capsys):
    assert run("sources") == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    lists = families.STYLES, families.SOURCES, formats.FORMATS
    assert [len(table.splitlines()) - 2 for table in tables] == [len(rows) for rows in lists]
    pages = ("sources.md", "conversion.md")
    text = "\n".join((ROOT / "docs" / page).read_text() for page in pages)
    assert all(table in text for table in tables), (
        "docs/sources.md and docs/conversion.md are not up to date: paste the output of "
        "`convert_checkpoints.py sources`"
    )


def test_every_source_is_tested_and_documented():
    assert set(synthetic.names()) | {"dinov2_vits14_onnx"} == set(families.SOURCES)
    for source in families.SOURCES.values():
        assert source.file and source.oracle, source.name


def test_the_script_exits_2_with_one_line_on_a_bad_file(tmp_path):
    (tmp_path / "f.pt").write_bytes(b"PK\x03\x04 not really")
    done = subprocess.run(
        [sys.executable, "convert_checkpoints.py", "inspect", f"--input={tmp_path / 'f.pt'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "zip directory" in lines[0]
    assert "Traceback" not in done.stderr


def test_output_into_a_pipe_that_closes_is_no_error(weights):
    done = subprocess.run(
        f"{sys.executable} convert_checkpoints.py inspect --input={weights} | head -1",
        cwd=ROOT,
        capture_output=True,
        text=True,
        shell=True,
    )
    assert "torch zip" in done.stdout and not done.stderr


KILLED = """
import sys, time
from etils import epath
from fd_jax import checkpoint
from fd_jax.convert import families, importing
from tests.convert import synthetic
families.SOURCES[{name!r}] = synthetic.small_source({name!r})
def stop():
    print("stopped", flush=True)
    time.sleep(60)
save, local = checkpoint.save_tree, type(epath.Path("."))
rmtree = local.rmtree
if {moment!r} == "arrays are written":
    checkpoint.save_tree = lambda path, tree: (save(path, tree), stop())
else:
    local.rmtree = lambda path: stop() if path.name.endswith(".replaced") else rmtree(path)
importing.import_file({name!r}, {weights!r}, {output!r}, overwrite={overwrite})
"""


@pytest.mark.parametrize(
    ("overwrite", "moment", "left"),
    [
        (False, "arrays are written", None),
        (True, "arrays are written", 16),
        (True, "the old folder goes", 12),
    ],
)
def test_a_kill_leaves_no_half_written_folder(overwrite, moment, left, weights, tmp_path):
    """After a kill there is no folder, the old one or the new one, by its image size."""
    output = tmp_path / "model"
    if overwrite:
        importing.import_file(NAME, weights, output, image_size=16)
    script = KILLED.format(
        name=NAME,
        weights=str(weights),
        output=str(output),
        overwrite=overwrite,
        moment=moment,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "stopped"
    process.send_signal(signal.SIGKILL)
    process.wait()
    if left is not None:
        assert model_folder.load(output)[0].arch["image_size"] == left
    else:
        assert not output.exists()
        with pytest.raises(ModelFolderError, match="no model folder"):
            model_folder.load(output)
    importing.import_file(NAME, weights, output, overwrite=overwrite)
    assert model_folder.load(output)[0].arch["image_size"] == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.pth"]


def test_import_says_whether_the_file_is_the_public_one(weights, tmp_path, capsys, monkeypatch):
    common = ("import", "--source", NAME, "--input", weights, "--overwrite", "--output")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    source = families.SOURCES[NAME]
    for published, message in (
        ("", f"SHA-256 {digest}\n"),
        (digest[:8], f"{digest}, that of the public {source.file}"),
        ("0123456789", "begins with 01234567: this one was trained on, saved again or changed"),
    ):
        changed = dataclasses.replace(source, published=published)
        monkeypatch.setitem(families.SOURCES, NAME, changed)
        assert run(*common, tmp_path / "model") == 0
        assert message in capsys.readouterr().out


def test_import_reports_nan_and_makes_no_infinity(small, tmp_path, capsys):
    given = synthetic.structure(NAME)
    trees = synthetic.values(given)
    trees["model"]["encoder.blocks.1.mlp.fc1.bias"][3] = 1e5
    path = synthetic.write(given, trees, tmp_path)
    common = ("import", "--source", NAME, "--input", path, "--overwrite", "--output")
    assert run(*common, tmp_path / "model", "--dtype", "float16") == 2
    assert "encoder/blocks/1/mlp/fc1/bias has values that float16" in capsys.readouterr().err
    assert run(*common, tmp_path / "model", "--dtype", "bfloat16") == 0
    assert "warning" not in capsys.readouterr().out
    trees["model"]["encoder.blocks.1.mlp.fc1.bias"][3] = np.nan
    synthetic.write(given, trees, tmp_path)
    assert run(*common, tmp_path / "model") == 0
    out = capsys.readouterr().out
    assert "warning: NaN or infinity in encoder/blocks/1/mlp/fc1/bias:" in out


def test_published_checksums_are_those_in_the_file_names():
    for source in synthetic.REAL.values():
        digits = re.search(r"-([0-9a-f]{8})\.pth$", source.file)
        if digits:
            assert source.published == digits[1]
        assert len(source.published) in (0, 8, 64)


def test_progress_counts_every_byte_once(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importing, "_LAZY_SIZE", 1000)
    calls = []
    importing.import_file(NAME, weights, tmp_path / "a", progress=lambda *call: calls.append(call))
    last = {what: (done, total) for what, done, total in calls}
    assert list(last) == ["checking the sum of", "writing"]
    assert last["checking the sum of"] == (weights.stat().st_size,) * 2
    written = sum(a.nbytes for a in flat(model_folder.load(tmp_path / "a")[1]).values())
    assert last["writing"] == (written, written)
    monkeypatch.setattr(cli._Progress, "EVERY", 0.0)
    assert run("import", "--source", NAME, "--input", weights, "--output", tmp_path / "b") == 0
    assert re.search(r"^writing \d\.\d of \d\.\d GB$", capsys.readouterr().err, re.MULTILINE)


def test_the_import_report_names_few_kinds_of_dropped_tensors():
    kinds = [f"decoder.{letter}.weight" for letter in "abcdef"]
    spec = synthetic.REAL["mae_vit_base_full"].parts["encoder"].spec
    result = importing.Imported("s", spec, {}, {"the decoder": kinds}, {}, "", [])
    assert re.search("dropped 6 tensors.*and 3 more kinds", listing.import_report(result))

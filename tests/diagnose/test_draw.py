"""Figures show the numbers of their record, all of them and nothing else."""

import copy
import io
import subprocess
import sys
from xml.etree import ElementTree

from etils import epath
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
import pytest

from fd_jax.diagnose import draw
from fd_jax.diagnose.draw import names, panels, style
from tests.diagnose import records


@pytest.fixture(scope="module")
def record():
    """A ViT before and after, and a Swin, with every figure that is defined for them."""
    return records.record()


@pytest.fixture(scope="module")
def files(record, tmp_path_factory):
    """The files of all figures by name."""
    paths = draw.draw_all(record, epath.Path(tmp_path_factory.mktemp("figures")))
    return {path.name: path for path in paths}


def ink(figure):
    """Standard deviation of the grey values inside each of a figure's axes, without the frame."""
    with style.applied():
        content = io.BytesIO(style.encoded(figure, "png"))
    image = np.asarray(Image.open(content).convert("L"))[::-1]
    boxes = [axes.get_window_extent().padded(-2).extents.astype(int) for axes in figure.axes]
    return [image[bottom:top, left:right].std() for left, bottom, right, top in boxes]


def test_every_figure_is_written_as_png_and_svg(record, files):
    assert list(files) == [f"{name}.{kind}" for name in draw.DRAWINGS for kind in ("png", "svg")]
    assert not plt.get_fignums()
    folder = next(iter(files.values())).parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_no_panel_is_blank(record, files, name):
    figure = draw.figure(record, name)
    assert min(ink(figure)) > 5
    size = figure.get_size_inches() * style.DPI
    assert np.allclose(Image.open(files[f"{name}.png"]).size, size, atol=1)
    root = ElementTree.parse(files[f"{name}.svg"]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_an_empty_panel_is_blank():
    """The negative control of the test above: axes with a frame, but without data."""
    with style.applied():
        figure = style.new_figure(3, 3)
        figure.subplots().grid(False)
    assert ink(figure) == [0]


@pytest.mark.parametrize("name", ["distance", "entropy"])
def test_each_head_is_a_dot(record, name):
    figure = draw.figure(record, name)
    for axes, model in zip(figure.axes, record["models"].values(), strict=True):
        points = [(layer, y) for layer, heads in enumerate(model[name]) for y in heads]
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), points)
        means = [np.mean(heads) for heads in model[name]]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), means)
    limits = [axes.get_ylim() for axes in figure.axes]
    assert len(set(limits)) == 1
    assert limits[0][0] == 0 and limits[0][1] > max(max(heads) for heads in model[name])


def test_a_panel_of_distances_states_what_was_dropped(record):
    notes = [axes.texts[0].get_text() for axes in draw.figure(record, "distance").axes]
    for note, model in zip(notes, record["models"].values(), strict=True):
        share = np.mean(np.concatenate(model["dropped"]))
        assert f"{share:.1%}" in note if model["about"]["prefix"] else "nothing dropped" in note
    assert "; renormalised" in notes[0]
    kept = {**record, "settings": {**record["settings"], "normalize": "none"}}
    assert "not renormalised" in draw.figure(kept, "distance").axes[0].texts[0].get_text()


@pytest.mark.parametrize("name", ["similarity", "divergence", "rank"])
def test_each_model_is_a_line(record, name):
    figure = draw.figure(record, name)
    lines = figure.axes[0].lines
    for line, model in zip(lines, record["models"].values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), model[name])
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == len(lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(record["models"])


@pytest.mark.parametrize("name", ["cka", "cosine"])
def test_each_pair_is_a_line(record, name):
    figure = draw.figure(record, name)
    lines = figure.axes[0].lines
    pairs = [pair for pair in record["pairs"] if name in pair]
    assert len(pairs) == {"cka": 2, "cosine": 1}[name]
    for line, pair in zip(lines, pairs, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), pair[name])
    if name == "cka":
        entries = [text.get_text() for text in figure.legends[0].get_texts()]
        assert entries == ["clip and\nstudent", "clip and\nswin\n(mean patch of each image)"]


def test_shares_are_two_lines_in_a_panel_per_model(record):
    axes = draw.figure(record, "shares").axes
    for panel, model in zip(axes, record["models"].values(), strict=True):
        for line, kind in zip(panel.lines, ("offset", "key"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), model["shares"][kind])


def test_a_landscape_has_a_curve_for_each_direction(record):
    figure = draw.figure(record, "landscape")
    grid = np.reshape(figure.axes, (-1, 2))
    models = [model for model in record["models"].values() if "landscape" in model]
    for row, model in zip(grid, models, strict=True):
        for axes, key in zip(row, ("loss", "accuracy"), strict=True):
            for line, values in zip(axes.lines, model["landscape"][key], strict=True):
                np.testing.assert_array_equal(line.get_xdata(), model["landscape"]["position"])
                np.testing.assert_array_equal(line.get_ydata(), values)
    assert len({axes.get_ylim() for axes in grid[:, 0]}) == 1
    assert len({axes.get_ylim() for axes in grid[:, 1]}) == 1
    conditions = figure.get_suptitle().replace("\n", " ")
    assert "512 images of digits/test" in conditions and "tables: zeroed" in conditions
    assert conditions.count("augmentation: none") == 1  # The same for both models.


def test_the_axis_of_the_loss_is_cut_only_if_a_curve_exceeds_it(record):
    below = draw.figure(record, "landscape").axes[0]
    assert below.get_ylim()[1] < 5 and not below.texts
    high = copy.deepcopy(record)
    high["models"]["clip"]["landscape"]["loss"][0][0] = 7.5
    above = draw.figure(high, "landscape").axes
    assert above[0].get_ylim() == (0, 5) and "7.5" in above[0].texts[0].get_text()
    assert above[2].get_ylim() == (0, 5) and not above[2].texts  # the other model


def images(figure, shape):
    """The arrays that a figure draws, without colour bars."""
    arrays = [np.ma.getdata(axes.images[0].get_array()) for axes in figure.axes]
    return [array for array in arrays if array.shape != shape]


BAR = (1, 256)


def test_maps_are_drawn_entry_by_entry(record):
    drawn = images(draw.figure(record, "maps"), BAR)
    maps = [layer for model in record["models"].values() for layer in model["maps"]]
    for array, expected in zip(drawn, maps, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("name", ["class_row", "class_column"])
def test_values_of_patches_are_at_their_places_in_the_picture(record, name):
    drawn = images(draw.figure(record, name), BAR)
    expected = [
        np.reshape(values, model["about"]["grid"][layer])
        for model in record["models"].values()
        for layer, values in enumerate(model.get(name, []))
    ]
    for array, values in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(array, values)
    assert expected[0].shape == (3, 4)  # Not square: transposed images would differ.


@pytest.mark.parametrize("name", ["pca", "rollout"])
def test_one_picture_is_drawn_beside_what_models_make_of_it(record, name):
    drawn = images(draw.figure(record, name), BAR)
    models = [model for model in record["models"].values() if name in model]
    np.testing.assert_array_equal(drawn[0], record["picture"]["pixels"])
    for array, model in zip(drawn[1:], models, strict=True):
        np.testing.assert_array_equal(array, model[name])


def test_all_heads_of_a_layer_are_drawn(record):
    drawn = images(draw.figure(record, "heads"), BAR)
    models = [model for model in record["models"].values() if "heads" in model]
    expected = [
        array for model in models for array in (record["picture"]["pixels"], *model["heads"])
    ]
    for array, values in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(array, values)


def test_each_entry_of_a_map_has_whole_pixels_of_the_file(record, files):
    """Every panel of the PNG is its map in the colours of the scale, with no blended pixel."""
    image = np.asarray(Image.open(files["maps.png"]).convert("RGB"))
    for axes in draw.figure(record, "maps").axes:
        values = axes.images[0].get_array()
        if values.shape == BAR:
            continue
        colours = matplotlib.colormaps["magma"](axes.images[0].norm(values), bytes=True)[..., :3]
        scale = -(-panels.SIDE // len(values))
        expected = colours.repeat(scale, 0).repeat(scale, 1)
        box = axes.get_window_extent()
        top, left = round(len(image) - box.y1), round(box.x0)
        drawn = image[top : top + len(expected), left : left + len(expected)]
        np.testing.assert_array_equal(drawn, expected)


def test_maps_in_svg_are_pixelated_and_have_their_own_resolution(record, files):
    text = files["maps.svg"].read_text()
    sides = {len(layer) for model in record["models"].values() for layer in model["maps"]}
    assert text.count("image-rendering:pixelated") == text.count("<image ")
    assert {f'width="{side}" height="{side}"' in text for side in sides} == {True}


def test_the_scale_shows_a_diagonal_of_a_large_map():
    """A diagonal ten times as strong as the rest, beside an outlier a thousand times as strong."""
    values = np.full((196, 196), 1e-3)
    np.fill_diagonal(values, 1e-2)
    values[0, 5] = 1
    shown = panels.log_scale(values)(values)
    assert shown[3, 3] - shown[3, 4] > 0.9
    linear = values / values.max()
    assert linear[3, 3] - linear[3, 4] < 0.01


@pytest.mark.parametrize("value", [0.0, 1 / 196])
def test_equal_weights_have_a_scale(value):
    values = np.full((4, 4), value)
    for scale in (panels.log_scale(values), panels.linear_scale(values)):
        assert np.isfinite(scale(values)).all() and scale.vmin < scale.vmax


def test_figures_that_are_not_in_the_record_are_not_drawn(record, tmp_path):
    kept = ("about", "rank")
    models = {
        name: {key: model[key] for key in kept if key in model}
        for name, model in record["models"].items()
    }
    small = {**record, "models": models, "pairs": []}
    paths = draw.draw_all(small, epath.Path(tmp_path))
    assert [path.name for path in paths] == ["rank.png", "rank.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank.png", "rank.svg"]


def encoded(record, name):
    figure = draw.figure(record, name)
    with style.applied():
        return [style.encoded(figure, kind) for kind in draw.KINDS]


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_the_same_record_gives_the_same_bytes_and_another_number_does_not(record, files, name):
    before = [files[f"{name}.{kind}"].read_bytes() for kind in draw.KINDS]
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):  # A user's own settings.
        assert encoded(record, name) == before
    other = encoded(records.changed(record, name), name)
    assert all(new != old for new, old in zip(other, before, strict=True))


def test_matplotlib_is_imported_only_to_draw():
    """The import of the package, in a process of its own."""
    imports = "import sys, fd_jax.diagnose.draw, fd_jax.diagnose.html"
    script = f"{imports}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def unseen(axis):
    """Labels of the ticks that lie outside of an axis, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = axis.get_major_ticks()
    return [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]


def overlaps(figure):
    """Pairs of texts whose boxes overlap, and texts that leave the figure."""
    with style.applied():
        figure.draw_without_rendering()
        hidden = {
            label
            for axes in figure.axes
            for axis in (axes.xaxis, axes.yaxis)
            for label in unseen(axis)
        }
        texts = [
            text
            for text in figure.findobj(matplotlib.text.Text)
            if text.get_text() and text.get_visible() and text not in hidden
        ]
    boxes = [text.get_window_extent() for text in texts]
    assert min(text.get_fontsize() for text in texts) >= 7
    page = figure.bbox.padded(1)
    outside = [
        text.get_text()
        for text, box in zip(texts, boxes, strict=True)
        if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1
    ]
    pairs = [
        (a.get_text(), b.get_text())
        for i, a in enumerate(texts)
        for j, b in enumerate(texts[:i])
        if boxes[i].padded(-1).overlaps(boxes[j].padded(-1))
    ]
    return outside + pairs


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_no_texts_overlap_or_are_cut_off(name):
    """Four models with long names and many layers; of images, fewer show the same."""
    layers = 5 if draw.DRAWINGS[name].__module__.endswith("maps") else 24
    assert overlaps(draw.figure(records.large(layers), name)) == []


def test_overlaps_are_found():
    """The negative control of the test above."""
    with style.applied():
        figure = style.new_figure(2, 2)
        figure.text(0.1, 0.5, "one text")
        figure.text(0.12, 0.5, "another")
        figure.text(0.8, 0.1, "cut off at the right edge")
    assert len(overlaps(figure)) == 2


def test_titles_are_short_and_different():
    long = "clip_vit_large_patch14_" * 6
    odd = "a\nb\x1b$1$\udc80"
    titles = names.titles([f"{long}a{long}", f"{long}b{long}", "clip", odd], width=20)
    assert len(set(titles.values())) == 4
    assert titles["clip"] == "clip"
    assert all(len(line) <= 20 for title in titles.values() for line in title.split("\n"))
    assert all(title.count("\n") < names.LINES for title in titles.values())
    assert len(set(names.titles(["a", " a", "a\u2003"], width=20).values())) == 3
    assert titles[odd] == "a\ufffdb\ufffd$1$\ufffd"


def test_many_models_of_one_head_and_one_token():
    """Ten models, whose lines still differ, and maps without any contrast."""
    models = {
        f"model {seed}": records.vit(seed, layers=1, heads=1, grid=(1, 1)) for seed in range(10)
    }
    record = records.record(models)
    lines = draw.figure(record, "rank").axes[0].lines
    assert (
        len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 10
    )
    for name in ("distance", "maps", "cka"):
        assert overlaps(draw.figure(record, name)) == []


def test_every_name_gives_valid_files(record, tmp_path):
    kept = ("about", "distance", "dropped", "rank", "landscape", "rollout")
    clip, student = (
        {key: record["models"][name][key] for key in kept} for name in ("clip", "student")
    )
    odd = {'a <b> & "c" $x_1$ --> \x07': clip, "_hidden": student}
    renamed = {**record, "models": odd, "pairs": []}
    for path in draw.draw_all(renamed, epath.Path(tmp_path)):
        if path.suffix == ".svg":
            ElementTree.parse(path)
    legend = draw.figure(renamed, "rank").legends[0]
    assert [text.get_text() for text in legend.get_texts()][1] == "_hidden"

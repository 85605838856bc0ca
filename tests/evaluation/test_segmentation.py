"""Predictions for whole pictures and their mean IoU, against plain loops in torch and OpenCV."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import cv2
import jax
import numpy as np
from PIL import Image
import pytest
import torch
from torch.nn import functional

from fd_jax import inference, sharding
from fd_jax.data.segmentation import SegmentationFeed
from fd_jax.errors import ConfigError, DataError
from fd_jax.evaluation import evaluators, segmentation
from fd_jax.models.segmenter import sliding
from fd_jax.tasks.segment import SegmentTask
from fd_jax.training import program
from tests import ports, tiny, xla
from tests.evaluation import segments
from tests.evaluation.segments import CLASSES, SCALE, SIDE

ROOT = pathlib.Path(__file__).parent.parent.parent
STRIDE = 20


def evaluator(**options):
    options = {"stride": STRIDE, **options}
    return segmentation.Segmented(8, CLASSES, SIDE, SCALE, **options)


@pytest.fixture(scope="module")
def made():
    return segments.spec()


@pytest.fixture(scope="module")
def network(made):
    """uint8 [32, 32, 3] -> logits [K, 16, 16] as a torch tensor."""
    run = segments.compiled(made, jax.devices()[:1])
    weights = segments.weights(made, run.mesh)

    def logits(window):
        out = run.predict(weights.params, weights.extra, {}, {"image": window[None]})
        return torch.from_numpy(np.array(out[0])).permute(2, 0, 1)

    return logits


def resized(logits, size):
    return functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def plain_scale(height, width, ratio):
    """Short side 36 * ratio, at least that of a window, unless the long one is above 64 * ratio."""
    long, short = int(64 * ratio), int(36 * ratio)
    factor = min(long / max(height, width), short / min(height, width))
    if min(height, width) * factor < SIDE:
        factor = SIDE / min(height, width)
    return round(height * factor + 1e-9), round(width * factor + 1e-9)


def plain_logits(network, image, size, *, scaled, stride=STRIDE, padded=False):
    """One picture through windows, summed in a picture of counts. -> [K, *size]"""
    image = sliding.resize_picture(image, scaled)
    height, width = scaled
    total, count = torch.zeros(CLASSES, *scaled), torch.zeros(1, *scaled)
    for y in range(0, max(height - SIDE + stride, 1), stride):
        for x in range(0, max(width - SIDE + stride, 1), stride):
            top, left = (y, x) if padded else (min(y, height - SIDE), min(x, width - SIDE))
            window = image[top : top + SIDE, left : left + SIDE]
            h, w = window.shape[:2]
            window = np.pad(window, ((0, SIDE - h), (0, SIDE - w), (0, 0)))
            enlarged = resized(network(window), (SIDE, SIDE))[:, :h, :w]
            total[:, top : top + h, left : left + w] += enlarged
            count[:, top : top + h, left : left + w] += 1
    assert count.min() > 0
    return resized(total / count, size)


def plain_labels(network, picture, ratios=(1.0,), flip=False, **options):
    """argmax of the mean probability over all versions of a picture."""
    total = torch.zeros(CLASSES, *picture.mask.shape)
    for ratio in ratios:
        scaled = plain_scale(*picture.image.shape[:2], ratio)
        for mirrored in (False, True) if flip else (False,):
            image = picture.image[:, ::-1] if mirrored else picture.image
            logits = plain_logits(
                network, np.ascontiguousarray(image), picture.mask.shape, scaled=scaled, **options
            )
            probability = torch.softmax(logits, dim=0)
            total += probability.flip(-1) if mirrored else probability
    return total.argmax(dim=0).numpy()


def counted(mask, labels):
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for label, prediction in zip(mask.ravel(), labels.ravel(), strict=True):
        if label != 255:
            matrix[label, prediction] += 1
    return matrix


def plain_matrix(network, pictures, **options):
    parts = [counted(p.mask, plain_labels(network, p, **options)) for p in pictures]
    return np.sum(parts, axis=0)


def plain_miou(matrix):
    values = []
    for k in range(len(matrix)):
        union = matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]
        if union:
            values.append(matrix[k, k] / union)
    return np.mean(values)


def measured(made, pictures, devices=1, axes=None, **options):
    run = segments.compiled(made, jax.devices()[:devices], **(axes or {}))
    weights = segments.weights(made, run.mesh)
    return evaluator(**options).confusion_matrix(run, weights, pictures)


def moved(got, want):
    """Share of pixels that are counted elsewhere."""
    assert got.sum() == want.sum()
    return np.abs(got - want).sum() / 2 / want.sum()


@pytest.fixture(scope="module")
def wanted(network):
    return plain_matrix(network, segments.held_out().items)


@pytest.mark.parametrize(
    "length,want",
    [(512, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342]), (683, [0, 171])],
)
def test_the_last_window_ends_with_the_picture(length, want):
    assert sliding.starts(length, 512, 341) == want
    square = sliding.windows(length, 600, 512, 341)
    assert square == [(top, left) for top in want for left in (0, 88)]
    assert max(top for top, _ in square) + 512 == length


def test_pictures_are_resized_as_by_opencv():
    image = segments.picture(3, (90, 61)).image
    for size in ((36, 53), (120, 200), (90, 30)):
        want = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).astype(int)
        error = np.abs(sliding.resize_picture(image, size) - want)
        assert error.max() <= 1 and error.mean() < 0.2  # it rounds in fixed point
    small = Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR)
    assert np.abs(sliding.resize_picture(image, (20, 30)) - np.asarray(small, int)).mean() > 5


def test_pictures_keep_their_aspect_within_the_scale():
    assert sliding.scaled_size(375, 500, (2048, 512), side=512) == (512, 683)
    assert sliding.scaled_size(500, 375, (512, 2048), side=512) == (683, 512)
    # Bounded by the long side, then enlarged again to hold a window.
    assert sliding.scaled_size(100, 1000, (2048, 512), side=200) == (205, 2048)
    assert sliding.scaled_size(100, 1000, (2048, 512), side=512) == (512, 5120)
    assert sliding.scaled_size(375, 500, (1024, 256), side=512) == (512, 683)


@pytest.mark.parametrize(
    "devices,axes",
    [(1, {}), (2, {}), (8, {}), (8, {"tensor": 2, "fsdp": 2})],
    ids=["1", "2", "8", "2x2x2"],
)
def test_the_whole_set_equals_a_loop_over_pictures(made, wanted, devices, axes):
    got = measured(made, segments.held_out(), devices, axes)
    assert (got[:-1].sum(axis=0) > 0).sum() >= 4  # the network has an opinion
    assert moved(got, wanted) < 2e-4


def test_wrong_variants_would_be_seen(made, network, wanted):
    pictures = segments.held_out().items
    got = measured(made, segments.held_out())
    assert moved(got, plain_matrix(network, pictures, padded=True)) > 0.01
    assert moved(got, plain_matrix(network, pictures, stride=SIDE)) > 0.01
    # The label resized to the scaled picture, in the place of the logits.
    small = []
    for picture in pictures:
        scaled = plain_scale(*picture.image.shape[:2], 1.0)
        mask = cv2.resize(picture.mask, scaled[::-1], interpolation=cv2.INTER_NEAREST)
        small.append(counted(mask, plain_labels(network, dataclasses.replace(picture, mask=mask))))
    exact = segmentation.scores(got).miou
    assert exact == pytest.approx(plain_miou(wanted), abs=1e-4)
    assert abs(exact - plain_miou(np.sum(small, axis=0))) > 1e-3
    each = [counted(p.mask, plain_labels(network, p)) for p in pictures]
    assert abs(exact - np.mean([plain_miou(matrix) for matrix in each])) > 1e-3


def test_several_scales_and_mirror_images_average_probabilities(made, network):
    pictures = segments.held_out(segments.SIZES[:3])
    options = {"scales": (0.5, 1.25), "flip": True}
    got = measured(made, pictures, **options)
    want = plain_matrix(network, pictures.items, ratios=(0.5, 1.25), flip=True)
    assert moved(got, want) < 2e-4
    for wrong in ({"ratios": (0.5, 1.25)}, {"ratios": (1.25,), "flip": True}):
        assert moved(got, plain_matrix(network, pictures.items, **wrong)) > 0.01


def test_labels_of_another_size_than_the_picture(made, network):
    pictures = segments.held_out(segments.SIZES[:2])
    other = [dataclasses.replace(p, mask=np.ascontiguousarray(p.mask[::2])) for p in pictures.items]
    got = measured(made, segments.Pictures(other))
    assert moved(got, plain_matrix(network, other)) < 2e-4


def test_nothing_is_compiled_for_the_size_of_a_picture(made):
    run = segments.compiled(made, jax.devices()[:2])
    weights = segments.weights(made, run.mesh)
    evaluator()(run, weights, segments.held_out(segments.SIZES[:1]))
    traced = []
    listener = lambda event, *_, **__: traced.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        result = evaluator()(run, weights, segments.held_out())
        assert not [event for event in traced if "compile" in event], traced
        jax.jit(lambda x: x + 1)(np.zeros(3))
        assert [event for event in traced if "compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert run.predict._cache_size() == 1
    assert set(result) == {"miou", "macc", "aacc"}


def whole_labels(made, params, picture, *, fill, cut=True, ratio=1.0, mirrored=False):
    """One pass over the picture, with position tables that NumPy resized. -> [K, h, w] logits"""
    height, width = picture.image.shape[:2]
    factor = min(int(64 * ratio) / max(height, width), int(36 * ratio) / min(height, width))
    size = round(height * factor + 1e-9), round(width * factor + 1e-9)
    image = sliding.resize_picture(picture.image, size)
    image = image[:, ::-1] if mirrored else image
    patch = made.arch["patch_size"]
    filled = [-(-side // patch) * patch for side in size]
    padded = np.tile(np.array(fill, np.uint8), (*filled, 1))
    padded[: size[0], : size[1]] = image
    spec, encoder = made.resized(params["encoder"], filled)
    images = made.normalize(padded[None])
    run = jax.jit(functools.partial(inference.segmenter_logits, spec))
    found = run({**params, "encoder": encoder}, images)
    logits = torch.from_numpy(np.array(found[0])).permute(2, 0, 1)
    if cut:
        logits = resized(logits, filled)[:, : size[0], : size[1]]
    logits = resized(logits, picture.mask.shape)
    return logits.flip(-1) if mirrored else logits


def whole_matrix(made, pictures, **options):
    params = segments.parts(made)
    labels = [whole_labels(made, params, p, **options).argmax(dim=0).numpy() for p in pictures]
    return np.sum([counted(p.mask, each) for p, each in zip(pictures, labels, strict=True)], axis=0)


FILL = 124, 116, 104
WHOLE_SIZES = (40, 57), (90, 50), (80, 114)  # the first and third become one


@pytest.fixture(scope="module")
def whole_run(made):
    return segments.of_any_size(made, jax.devices()[:2])


@pytest.mark.slow
def test_whole_pictures_equal_one_pass_over_each(made, whole_run):
    pictures = segments.held_out(WHOLE_SIZES)
    whole = evaluator(mode="whole", patch=made.arch["patch_size"], fill=FILL)
    got = whole.confusion_matrix(whole_run, segments.weights(made, whole_run.mesh), pictures)
    assert (got[:-1].sum(axis=0) > 0).sum() >= 4
    assert moved(got, whole_matrix(made, pictures.items, fill=FILL)) < 2e-4
    assert whole_run.predict._cache_size() == len(WHOLE_SIZES) - 1  # one for each size
    for wrong in ({"fill": (0, 0, 0)}, {"fill": FILL, "cut": False}):
        assert moved(got, whole_matrix(made, pictures.items, **wrong)) > 2e-3


@pytest.mark.slow
def test_whole_pictures_at_several_scales(made, whole_run):
    pictures = segments.held_out(WHOLE_SIZES[:1])
    whole = evaluator(
        mode="whole", patch=made.arch["patch_size"], fill=FILL, scales=(0.75, 1.0), flip=True
    )
    got = whole.confusion_matrix(whole_run, segments.weights(made, whole_run.mesh), pictures)
    params, (picture,) = segments.parts(made), pictures.items
    views = [
        whole_labels(made, params, picture, fill=FILL, ratio=ratio, mirrored=mirrored).softmax(0)
        for ratio in (0.75, 1.0)
        for mirrored in (False, True)
    ]
    want = counted(picture.mask, np.array(torch.stack(views).sum(0).argmax(0)))
    assert moved(got, want) < 2e-3  # one pixel
    assert moved(got, counted(picture.mask, np.array(views[2].argmax(0)))) > 0.01


@pytest.mark.slow
def test_a_task_measures_the_pictures_of_a_folder(tmp_path):
    pictures = segments.held_out().items
    for split, items in (("training", pictures[:2]), ("validation", pictures)):
        for index, picture in enumerate(items):
            for kind, pixels in (("images", picture.image), ("annotations", picture.mask)):
                folder = tmp_path / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{split}_{index}.png")
    arch = {**tiny.TEACHER, "depth": 3}
    config = tiny.segmentation(
        **{
            "segment.family": "vit",
            "segment.arch": arch,
            "data.root": str(tmp_path),
            "data.reduce_zero_label": False,
            "ema_decay": 0.5,
        }
    )
    task = SegmentTask(config)
    feed = SegmentationFeed(**config.data, fill=task.fill, classes=CLASSES)
    mesh = sharding.make_mesh(devices=jax.devices()[:2], fsdp=2)
    run = program.build(
        task, config, mesh, steps_per_epoch=1, total_steps=4, elements=feed.elements
    )
    state = run.create(jax.random.key(0), {})
    mine, averaged = segmentation.from_config(config, task.spec, fill=task.fill)
    weights = evaluators.Weights(state.params, state.extra, {}, state.params)
    matrix = mine.confusion_matrix(run, weights, feed)
    same = mine.confusion_matrix(run, weights, segments.Pictures(pictures))
    np.testing.assert_array_equal(matrix, same)
    assert matrix.sum() == sum((p.mask != 255).sum() for p in pictures)
    result = mine(run, weights, feed)
    assert averaged(run, weights, feed) == {f"ema_{k}": v for k, v in result.items()}


def test_limit_counts_pictures_of_whole_batches(made):
    sizes = [(32, 32)] * 11
    run = segments.compiled(made, jax.devices()[:2])
    weights = segments.weights(made, run.mesh)
    data = segments.held_out(sizes)
    got = evaluator(limit=1).confusion_matrix(run, weights, data)
    first = evaluator().confusion_matrix(run, weights, segments.Pictures(data.items[:8]))
    np.testing.assert_array_equal(got, first)


def test_scores_equal_sets_of_pixels():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (30, 20)).astype(np.uint8)  # classes 4 and 5 have no label
    mask[:3] = 255
    predicted = rng.integers(0, 5, (30, 20))  # class 5 is not predicted either
    matrix = segmentation.confusion(mask, predicted, classes=6)
    assert matrix.dtype == np.int64
    got = segmentation.scores(matrix)
    valid = mask != 255
    for k in range(6):
        label, guess = valid & (mask == k), valid & (predicted == k)
        union, both = (label | guess).sum(), (label & guess).sum()
        np.testing.assert_equal(got.iou[k], both / union if union else np.nan)
        np.testing.assert_equal(got.accuracy[k], both / label.sum() if label.sum() else np.nan)
    assert got.iou[4] == 0 and np.isnan(got.iou[5]) and np.isnan(got.accuracy[4])
    assert got.miou == pytest.approx(got.iou[:5].mean())
    assert got.macc == pytest.approx(got.accuracy[:4].mean())
    assert got.aacc == pytest.approx((mask == predicted)[valid].mean())
    with pytest.raises(DataError, match="no held-out picture has a labelled pixel"):
        segmentation.scores(np.zeros((3, 3), np.int64))


def test_refusals(made):
    whole = tiny.segmentation(**{"eval.mode": "whole"})
    swin = dataclasses.replace(made, family="swin_v2")
    with pytest.raises(ConfigError, match="'swin_v2' takes only sizes.*set eval.mode='slide'"):
        segmentation.Segmented.of(whole, swin, fill=(0, 0, 0))
    assert segmentation.Segmented.of(whole, made, fill=(1, 2, 3)).fill == (1, 2, 3)
    with pytest.raises(ConfigError, match="eval.mode='Slide' is unknown"):
        evaluator(mode="Slide")
    for stride in (0, 33):
        with pytest.raises(
            ConfigError, match=f"stride of {stride}: expected a stride from 1 to 32"
        ):
            evaluator(stride=stride)
    with pytest.raises(ConfigError, match="at least one factor"):
        evaluator(scales=())
    data = segments.held_out(segments.SIZES[:1])
    data.items[0].mask[5, 5] = CLASSES
    with pytest.raises(DataError, match="picture 0 has a pixel of class 5.*segment.classes=5"):
        measured(made, data)


def start(process, count, port, tensor, devices, *more):
    env = {
        **os.environ,
        "XLA_FLAGS": xla.flags(devices),
    }
    command = [sys.executable, "-m", "tests.evaluation.segments"]
    command += [str(value) for value in (process, count, port, tensor, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("tensor,devices", [(1, 2), (2, 1)], ids=["shared", "same rows"])
def test_two_processes_give_the_same_numbers(made, tensor, devices):
    port = ports.free()
    processes = [start(i, 2, port, tensor, devices) for i in range(2)]
    first, second = map(finish, processes)
    names = [p.name for p in segments.held_out().items]
    if tensor == 1:
        assert first["opened"] == names[::2] and second["opened"] == names[1::2]
    else:
        assert first["opened"] == second["opened"] == names
    one = measured(made, segments.held_out(), 2)
    assert first["matrix"] == second["matrix"]
    assert moved(np.array(first["matrix"]), one) < 2e-4


@pytest.mark.slow
def test_a_picture_that_one_process_cannot_read_is_left_out_by_all(made, whole_run):
    """Without an agreement, the processes would wait for each other with different programs."""
    port = ports.free()
    processes = [start(i, 2, port, 1, 1, "whole", i) for i in range(2)]
    first, second = map(finish, processes)
    items = segments.held_out().items
    assert first["opened"] == [p.name for p in items if p.index != 0]
    assert second["opened"] == [p.name for p in items if p.index != 1]
    whole = evaluator(mode="whole", patch=made.arch["patch_size"])
    rest = segments.Pictures(items, broken={0, 1})
    one = whole.confusion_matrix(whole_run, segments.weights(made, whole_run.mesh), rest)
    assert one.sum() == sum((p.mask != 255).sum() for p in items[2:])
    assert first["matrix"] == second["matrix"]
    assert moved(np.array(first["matrix"]), one) < 2e-4


def test_pictures_of_many_sizes_do_not_all_wait(monkeypatch):
    """Groups are full or the oldest, and few pictures are kept."""
    monkeypatch.setattr(segmentation, "_WAITING", 3)
    sizes = [(32, 32), (32, 40), (32, 48), (32, 56), (32, 40), (32, 40), (32, 32)]
    read = []

    def coming():
        for picture in segments.held_out(sizes).items:
            read.append(picture.index)
            yield picture

    given = []
    for shapes, group in segmentation._by_size(coming(), lambda *size: (size,), 2):
        given += [picture.index for picture in group]
        assert {picture.image.shape[:2] for picture in group} == set(shapes)
        assert len(group) <= 2 and len(read) - len(given) <= 3
    assert given == [0, 1, 4, 2, 3, 5, 6]


def test_counts_above_32_bits_survive_the_exchange(monkeypatch):
    matrix = np.array([[2**31 - 1, 2**31], [2**40 + 12345, 7]])

    def gather(halves):
        assert halves.dtype == np.int32  # what JAX would make of int64
        return np.stack([halves, halves])

    monkeypatch.setattr(segmentation.sharding, "gathered", gather)
    np.testing.assert_array_equal(segmentation._sum_over_processes(matrix), 2 * matrix)

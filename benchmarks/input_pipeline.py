"""Images per CPU-second of the input pipeline, compared with TensorFlow's own operations.

    python -m benchmarks.input_pipeline

Each path decodes JPEGs of realistic size (500 x 375, from the photographs that scikit-image and
scikit-learn contain), takes the same random crops, resizes them to 224 x 224 with antialiasing and
flips half of them, on one thread. TensorFlow does this inside tf.data, where it is fastest. The
benchmark measures CPU time, so other work on the machine matters little. The paths take turns, and
the median round is reported.

The loader is then compared with the bare transform and its random draws, with threads and with
worker processes, in CPU time summed over all of them. The difference is the cost of order, queues
and batches. The cost of shared memory for batches from a worker process is printed separately.
"""

import argparse
from collections.abc import Callable, Iterator
import io
import itertools
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import grain
import numpy as np
from PIL import Image
import psutil

from fd_jax.data import pipeline, transforms
from fd_jax.data.builders import photos
from fd_jax.data.datasets import Example
from fd_jax.data.elements import Element
from fd_jax.data.shared import SharedBatches

HEIGHT, WIDTH, SIZE, MIN_AREA = 375, 500, 224, 0.08
Draw = tuple[tuple[int, int, int, int], bool]  # box (top, left, height, width), flip


def synthesise(quality: int) -> list[bytes]:
    """The photographs as JPEGs of ImageNet's usual size."""
    made = []
    for name in photos.PHOTOS:
        image = Image.fromarray(photos.load_photo(name))
        scale = max(WIDTH / image.width, HEIGHT / image.height)
        resized = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        resized.crop((0, 0, WIDTH, HEIGHT)).save(buffer, "JPEG", quality=quality)
        made.append(buffer.getvalue())
    return made


def draw(count: int) -> list[Draw]:
    """The crops and flips, the same for every path."""
    rng = np.random.default_rng(0)
    return [
        (
            transforms.random_resized_crop_box(rng, HEIGHT, WIDTH, min_area=MIN_AREA),
            rng.random() < 0.5,
        )
        for _ in range(count)
    ]


def ours(jpegs: list[bytes], draws: list[Draw]) -> Iterator[np.ndarray]:
    """The work that `TrainTransform` does after its random draws."""
    for data, ((top, left, h, w), flip) in zip(itertools.cycle(jpegs), draws, strict=False):
        crop = transforms.decode(data)[top : top + h, left : left + w]
        out = transforms.resize(crop, SIZE, SIZE, "bilinear")
        yield transforms.mirror(out) if flip else out


def pillow(jpegs: list[bytes], draws: list[Draw]) -> Iterator[np.ndarray]:
    """The PIL path of torchvision."""
    for data, ((top, left, h, w), flip) in zip(itertools.cycle(jpegs), draws, strict=False):
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + w, top + h))
        out = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        yield out[:, ::-1] if flip else out


def tensorflow(jpegs: list[bytes], draws: list[Draw]) -> Iterator[np.ndarray]:
    """decode_and_crop_jpeg and resize(antialias=True) in tf.data on one thread."""
    import tensorflow as tf

    def load(data, box, flip):
        image = tf.image.decode_and_crop_jpeg(data, box, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return tf.cond(flip, lambda: tf.image.flip_left_right(image), lambda: image)

    data = [jpegs[index % len(jpegs)] for index in range(len(draws))]
    boxes, flips = zip(*draws, strict=True)
    dataset = tf.data.Dataset.from_tensor_slices((data, list(boxes), list(flips))).map(load)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options).as_numpy_iterator()


PATHS: dict[str, Callable[[list[bytes], list[Draw]], Iterator[np.ndarray]]] = {
    "fd_jax": ours,
    "TensorFlow": tensorflow,
    "Pillow": pillow,
}


def rate(path: Callable, jpegs: list[bytes], draws: list[Draw]) -> float:
    """Images per CPU-second."""
    images = path(jpegs, draws)
    next(images)  # TensorFlow traces its graph here
    began = time.process_time()
    for _ in images:
        pass
    return (len(draws) - 1) / (time.process_time() - began)


def parity(path: Callable, jpegs: list[bytes], draws: list[Draw]) -> tuple[float, float]:
    """Worst mean and worst 99th percentile of a crop's absolute error against Pillow."""
    pairs = zip(path(jpegs, draws), pillow(jpegs, draws), strict=True)
    errors = [np.abs(one.astype(int) - other) for one, other in pairs]
    return max(e.mean() for e in errors), max(np.percentile(e, 99) for e in errors)


class Jpegs:
    """The synthesised pictures, repeated to a dataset of any size."""

    name = "synthesised"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, jpegs: list[bytes], size: int):
        self.jpegs, self.size = jpegs, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return Example(self.jpegs[index % len(self.jpegs)], -1)

    def describe(self, index: int) -> str:
        """The position in the dataset."""
        return str(index)


def loader_rate(jpegs: list[bytes], workers: int, threads: int, batches: int = 40) -> float:
    """Images per CPU-second of the loader in steady state."""
    transform = transforms.TrainTransform(
        SIZE, min_area=MIN_AREA, interpolation="bilinear", flip=True
    )
    loader = pipeline.TrainLoader(
        Jpegs(jpegs, 100_000),
        transforms.LabelledImage(transform),
        batch_size=64,
        seed=0,
        workers=workers,
        threads=threads,
    )
    for _ in range(10):  # fills the read-ahead queue; then production equals demand
        next(loader)
    began = cpu_seconds()
    for _ in range(batches):
        next(loader)
    rate = 64 * batches / (cpu_seconds() - began)
    loader.close()
    return rate


def bare_rate(jpegs: list[bytes], count: int) -> float:
    """Images per CPU-second of the transform alone, called in the same way as by the loader."""
    transform = transforms.TrainTransform(
        SIZE, min_area=MIN_AREA, interpolation="bilinear", flip=True
    )
    began = time.process_time()
    for index in range(count):
        transform(jpegs[index % len(jpegs)], np.random.default_rng(index))
    return count / (time.process_time() - began)


def stacking(rounds: int = 60) -> dict[str, float]:
    """CPU-microseconds per picture to stack a batch and to free it, by kind of memory."""
    pictures = [np.full((SIZE, SIZE, 3), i, np.uint8) for i in range(64)]
    shape = (len(pictures), SIZE, SIZE, 3)
    private, numbers = np.stack(pictures), itertools.count()
    ring = SharedBatches(
        pipeline.shared_slots(2), {"image": Element(shape[1:], "uint8")}, len(pictures)
    )
    rows = [{"image": picture} for picture in pictures]

    def to_private() -> None:
        np.stack(pictures, out=private)

    def to_ring() -> None:
        ring.take(ring.put(next(numbers), rows))

    def to_segment() -> None:
        segment = grain.multiprocessing.SharedMemoryArray(shape, np.uint8)
        np.stack(pictures, out=segment)
        segment.unlink_on_del()

    ways = {"private memory": to_private, "our ring": to_ring, "a new segment": to_segment}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, stack in ways.items():
            began = time.process_time()
            stack()
            times[name].append(time.process_time() - began)
    ring.close()
    return {name: statistics.median(each) * 1e6 / len(pictures) for name, each in times.items()}


def cpu_seconds() -> float:
    """CPU seconds of this process and of its living workers."""
    children = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(times.user + times.system for times in children)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality")
    args = parser.parse_args()

    jpegs, draws = synthesise(args.quality), draw(args.images)
    size = sum(map(len, jpegs)) / len(jpegs) / 1024
    print(f"{WIDTH} x {HEIGHT} JPEGs of {size:.0f} KiB on average -> {SIZE} x {SIZE}")
    rounds = [
        {name: rate(path, jpegs, draws) for name, path in PATHS.items()} for _ in range(args.rounds)
    ]
    for name, path in PATHS.items():
        value = statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each["TensorFlow"] for each in rounds)
        mean, high = parity(path, jpegs, draws)
        print(
            f"{name:10s} {value:6.0f} images/CPU-s, {ratio:.2f}x TensorFlow; "
            f"worst crop against Pillow: mean {mean:.2f}, 99th percentile {high:.0f}"
        )
    loaders, bare, rates = ((0, 1), (0, 2), (2, 1)), [], []
    for _ in range(args.rounds):
        bare.append(bare_rate(jpegs, args.images))
        rates.append([loader_rate(jpegs, *loader) for loader in loaders])
    print(f"the bare transform with its draws: {statistics.median(bare):.0f} images/CPU-s")
    for (workers, threads), values in zip(loaders, zip(*rates, strict=True), strict=True):
        shares = [value / beside for value, beside in zip(values, bare, strict=True)]
        print(
            f"loader with {workers} workers, {threads} threads: {statistics.median(values):.0f} "
            f"images/CPU-s, {statistics.median(shares):.2f} of the bare rate "
            f"({min(shares):.2f} to {max(shares):.2f})"
        )
    costs = ", ".join(f"{name} {cost:.0f} us" for name, cost in stacking().items())
    print(f"stacking a picture into its batch and freeing it: {costs}")


if __name__ == "__main__":
    main()

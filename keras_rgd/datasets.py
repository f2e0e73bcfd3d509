"""Image classification data sets of TensorFlow Datasets, in memory, without waiting for a network.

`tfds.load` of a data set that is not on disk tries for minutes; here that is said at once.
"""

import urllib.error
import urllib.request

import numpy as np

_MAX_PIXEL = np.iinfo(np.uint8).max
_READ_TOGETHER = 1024


class DatasetError(ValueError):
    """A data set is unknown, unfit or absent; the message says what to do."""


def load_dataset(name, split, *, data_dir=None, download=False, scale=_MAX_PIXEL):
    """One split of an image classification data set.

    Args:
        name: a data set of TensorFlow Datasets such as "mnist" or "emnist/letters".
        split: such as "train" or "train[:1000]".
        data_dir: the folder that holds it. Defaults to `None`, the ordinary folder of TensorFlow
            Datasets.
        download: whether to download a data set that is not on disk. Defaults to `False`.
        scale: what the pixels, 0 to 255, are divided by. Defaults to `255`.

    Returns:
        `(x, y)`: images as float32 of shape (examples, height, width, channels), labels as int64
        of shape (examples,).

    Raises:
        DatasetError: the data set is unknown, unfit or absent.
    """
    return read_split(_prepared(name, data_dir, download), split, scale)


def dataset_size(name, splits, *, data_dir=None, download=False):
    """How many examples the splits of a data set have together.

    Args:
        name: as in `load_dataset`.
        splits: their names.
        data_dir: as in `load_dataset`.
        download: as in `load_dataset`.

    Raises:
        DatasetError: the data set is unknown, unfit or absent.
    """
    infos = _prepared(name, data_dir, download).info.splits
    return sum(infos[split].num_examples for split in splits)


def _prepared(name, data_dir, download):
    """The builder of a data set that is on disk, or is downloaded now."""
    builder = _find(name, data_dir)
    _require_image_classification(builder)
    _require_on_disk(builder, name, download)
    return builder


def read_split(builder, split, scale):
    """One split of a prepared data set, as `load_dataset` returns it.

    Args:
        builder: a `tfds.core.DatasetBuilder` of images with labels.
        split: as in `load_dataset`.
        scale: as in `load_dataset`.

    Returns:
        `(x, y)`, as `load_dataset`.

    Raises:
        DatasetError: the data set has no such split.
    """
    import tensorflow_datasets as tfds

    try:
        dataset = builder.as_dataset(split=split, as_supervised=True)
    except ValueError as error:
        raise DatasetError(
            f"The data set {builder.info.full_name!r} has no split {split!r}. "
            f"It has the splits {', '.join(builder.info.splits)}."
        ) from error
    batches = list(tfds.as_numpy(dataset.batch(_READ_TOGETHER)))
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return images.astype(np.float32) / scale, labels


def _find(name, data_dir):
    """The builder of a data set, found without asking the network."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(
            f"Reading {name!r} needs TensorFlow Datasets, and importing it failed: {error}. "
            'Install it with: python -m pip install "keras-rgd[examples]"'
        ) from error
    tfds.disable_progress_bar()
    if name.startswith("huggingface:"):
        raise DatasetError(f"{name!r} is not a data set of TensorFlow Datasets itself.")
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise DatasetError(
            f"TensorFlow Datasets knows no data set {name!r}. Use a name from "
            "https://www.tensorflow.org/datasets/catalog/overview, such as 'mnist'."
        ) from error
    except (AssertionError, ImportError, ValueError) as error:
        # An unknown configuration or version, or a package that this data set's builder imports.
        raise DatasetError(f"TensorFlow Datasets cannot use {name!r}: {error}") from error


def _require_image_classification(builder):
    """Raise unless a data set pairs uint8 images of one size with a class."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    match [features.get(key) for key in builder.info.supervised_keys or ()]:
        case [tfds.features.Image() as image, tfds.features.ClassLabel()] if (
            None not in image.shape and image.np_dtype == np.uint8
        ):
            return
    raise DatasetError(
        f"{builder.info.full_name!r} is not an image classification data set with 8-bit images "
        f"of one size. Received features: {builder.info.features}"
    )


def _require_on_disk(builder, name, download):
    """Raise, or download, when a data set has not been prepared."""
    import tensorflow_datasets as tfds

    if builder.data_path.exists():
        return
    if not download:
        raise DatasetError(
            f"The data set {name!r} is not on this machine: there is no {builder.data_path}.\n"
            "Download it once with --download, or with\n"
            f'  python -c "import tensorflow_datasets as tfds; tfds.load({name!r})"'
        )
    _require_network(builder, name)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except (OSError, AssertionError, tfds.download.DownloadError) as error:
        raise DatasetError(f"Downloading the data set {name!r} failed: {error}") from error


def _require_network(builder, name):
    """Raise when none of a data set's hosts answers.

    TensorFlow Datasets retries each file ten times, which takes minutes on a machine without
    a network.

    Raises:
        DatasetError: none does.
    """
    urls = list(builder.url_infos or ())
    for url in urls:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=5):
                return
        except urllib.error.HTTPError:
            return  # the host answered, if only to refuse HEAD
        except OSError as error:
            reason = error
    if urls:
        raise DatasetError(f"Cannot download the data set {name!r}: {urls[-1]} ({reason}).")

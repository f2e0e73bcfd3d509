"""Data for the examples: the digits of scikit-learn, or a data set of TensorFlow Datasets.

The digits come inside scikit-learn, so they need no download; ``Digits`` makes them a data set like
any other. ``load`` gives every data set in the same form, and says at once when one is missing.
"""

import contextlib
import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DIGITS_DIR = Path("data", "tfds")
DIGITS_MAX = 16  # a pixel of the digits counts the black dots of a 4x4 block
TEST_EXAMPLES = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1797 handwritten 8x8 digits of scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 pixels from 0 to 16, as scikit-learn holds them.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        labels = load_digits().target
        train, test = train_test_split(
            np.arange(len(labels)), test_size=TEST_EXAMPLES, stratify=labels, random_state=0
        )
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, indices):
        digits = load_digits()
        images = digits.images.astype(np.uint8)[..., np.newaxis]
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(digits.target[index])}


def load(name, data_dir=None, *, download=False):
    """Loads an image classification data set into memory.

    Args:
        name: "digits", or a data set of TensorFlow Datasets such as "mnist" or "emnist/letters".
        data_dir: the folder that holds it. Defaults to `data/tfds` below the current folder for
            the digits, which are prepared there, and to the ordinary folder of TensorFlow
            Datasets for the others.
        download: whether to download a data set that is not on disk. Defaults to `False`.

    Returns:
        `(x_train, y_train), (x_test, y_test)`: images in [0, 1] as float32 of shape
        (examples, height, width, channels), labels as int64 of shape (examples,).

    Raises:
        SystemExit: if the data set is unknown, unfit or absent; the message says what to do.
    """
    tfds.disable_progress_bar()
    if name == "digits":
        builder = Digits(data_dir=data_dir or DIGITS_DIR)
        # TensorFlow Datasets would print that it downloads them.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        scale = DIGITS_MAX
    else:
        builder = _find(name, data_dir)
        _require_image_classification(builder)
        _require_on_disk(builder, name, download)
        scale = np.iinfo(np.uint8).max
    for split in ("train", "test"):
        if split not in builder.info.splits:
            raise SystemExit(
                f"The data set {name!r} has no {split!r} split. "
                f"Received splits: {', '.join(builder.info.splits)}."
            )
    return tuple(_arrays(builder, split, scale) for split in ("train", "test"))


def _find(name, data_dir):
    """The builder of a data set, found without asking the network."""
    if name.startswith("huggingface:"):
        raise SystemExit(f"{name!r} is not a data set of TensorFlow Datasets itself.")
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        raise SystemExit(
            f"TensorFlow Datasets knows no data set {name!r}. Use 'digits', which needs no "
            "download, or a name from https://www.tensorflow.org/datasets/catalog/overview, "
            "such as 'mnist'."
        ) from error
    except (AssertionError, ImportError, ValueError) as error:
        # An unknown configuration or version, or a package that this data set's builder imports.
        raise SystemExit(
            f"TensorFlow Datasets cannot use the data set {name!r}: {error}"
        ) from error


def _require_image_classification(builder):
    """Ends the program unless a data set pairs uint8 images of one size with a class."""
    features = dict(builder.info.features.items())
    match [features.get(key) for key in builder.info.supervised_keys or ()]:
        case [tfds.features.Image() as image, tfds.features.ClassLabel()] if (
            None not in image.shape and image.np_dtype == np.uint8
        ):
            return
    raise SystemExit(
        f"{builder.info.full_name!r} is not an image classification data set with 8-bit images "
        f"of one size. Received features: {builder.info.features}"
    )


def _require_on_disk(builder, name, download):
    """Ends the program, or downloads, when a data set has not been prepared."""
    if builder.data_path.exists():
        return
    if not download:
        raise SystemExit(
            f"The data set {name!r} is not on this machine: there is no {builder.data_path}.\n"
            "Download it once with --download, or with\n"
            f'  python -c "import tensorflow_datasets as tfds; tfds.load({name!r})"\n'
            "or use --dataset digits, which needs no download."
        )
    _require_network(builder, name)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except (OSError, AssertionError, tfds.download.DownloadError) as error:
        raise SystemExit(f"Downloading the data set {name!r} failed: {error}") from error


def _require_network(builder, name):
    """Ends the program when none of a data set's hosts answers.

    TensorFlow Datasets retries each file ten times, which takes minutes on a machine without
    a network.
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
        raise SystemExit(f"Cannot download the data set {name!r}: {urls[-1]} ({reason}).")


def _arrays(builder, split, scale):
    """One split as float32 images in [0, 1] and integer labels."""
    dataset = builder.as_dataset(split=split, batch_size=-1, as_supervised=True)
    images, labels = tfds.as_numpy(dataset)
    return images.astype(np.float32) / scale, labels

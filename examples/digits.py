"""Data for the examples: the digits of scikit-learn, or a data set of TensorFlow Datasets.

The digits come inside scikit-learn, so they need no download; ``Digits`` makes them a data set like
any other. ``load`` gives every data set in the same form, and says at once when one is missing.
"""

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_rgd.datasets import DatasetError, load_dataset, read_split

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
    splits = ("train", "test")
    if name == "digits":
        builder = Digits(data_dir=data_dir or DIGITS_DIR)
        # TensorFlow Datasets would print that it downloads them.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        return tuple(read_split(builder, split, DIGITS_MAX) for split in splits)
    try:
        options = dict(data_dir=data_dir, download=download)
        return tuple(load_dataset(name, split, **options) for split in splits)
    except DatasetError as error:
        raise SystemExit(f"{error}\nThe data set 'digits' needs no download.") from error


def positive_int(text):
    """An argument of the command line, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, received {text}")
    return value

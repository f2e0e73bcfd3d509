"""The examples of a data set in batches of one size, again and again in the same order."""

import itertools
import sys
import zlib

import keras
import numpy as np


def read(data):
    """A data set's own batches, checked.

    Args:
        data: a tuple `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset`
            or a `keras.utils.PyDataset`.

    Yields:
        (x, y, sample_weight) of each batch, its arrays as they are.

    Raises:
        ValueError: it is not what is described here.
    """
    if isinstance(data, keras.utils.PyDataset):
        endless = data.num_batches is None
        batches = (data[i] for i in (itertools.count() if endless else range(data.num_batches)))
    elif _is_tf_dataset(data):
        batches = data
    elif isinstance(data, tuple | list):
        batches = [data]
    else:
        raise ValueError(
            "`data` must be a tuple (x, y) or (x, y, sample_weight) of arrays, a batched "
            f"tf.data.Dataset or a keras.utils.PyDataset. Received: {type(data).__name__}"
        )
    for batch in batches:
        if isinstance(batch, tuple | list) and len(batch) > 3:
            raise ValueError(
                f"`data` must give x, (x, y) or (x, y, sample_weight). Received: {len(batch)} parts"
            )
        batch = tuple(batch) if isinstance(batch, list) else batch
        batch = keras.utils.unpack_x_y_sample_weight(batch)
        check_dense(*batch)
        check_lengths(*batch)
        yield batch


_NAMES = ("x", "y", "sample_weight")


def check_dense(x, y=None, sample_weight=None, what="Measuring D"):
    """Refuse sparse and ragged inputs.

    Args:
        x: inputs: arrays or tensors, or their `tf.TypeSpec`s.
        y: targets, likewise. Defaults to `None`.
        sample_weight: likewise. Defaults to `None`.
        what: what needs dense inputs, as the error's subject. Defaults to `"Measuring D"`.

    Raises:
        ValueError: an input is sparse or ragged; it is named.
    """
    for (which, *path), leaf in keras.tree.flatten_with_path((x, y, sample_weight)):
        kind = _not_dense(leaf)
        if kind is not None:
            name = _NAMES[which] + "".join(f"[{key!r}]" for key in path)
            write = "tensor.to_tensor()" if kind == "ragged" else "tf.sparse.to_dense(tensor)"
            raise ValueError(
                f"{what} needs dense inputs, and {name} is {kind}. Make it dense, with "
                f"{write}, in a data set by dataset.map(...). Training takes it as it is with "
                f"keras_rgd.RGD(..., window=32). Received: {name} of type {type(leaf).__name__}, "
                f"shape {tuple(leaf.shape)}"
            )


def _not_dense(leaf):
    tf = sys.modules.get("tensorflow")  # where it was never imported, nothing is of its kind
    if tf and isinstance(leaf, tf.RaggedTensor | tf.RaggedTensorSpec):
        return "ragged"
    is_sparse = tf and isinstance(leaf, tf.SparseTensor | tf.SparseTensorSpec)
    return "sparse" if is_sparse or hasattr(leaf, "tocoo") else None


def check_lengths(x, y, sample_weight):
    """Raise `ValueError` unless all arrays have the same positive length along axis 0."""
    lengths = {}
    for name, tree in zip(_NAMES, (x, y, sample_weight), strict=True):
        leaves = [t for t in keras.tree.flatten(tree) if t is not None]
        lengths[name] = sorted({_shape_length(t) for t in leaves}, key=str)
    distinct = {n for of_one in lengths.values() for n in of_one}
    if len(distinct) != 1 or None in distinct or 0 in distinct:
        given = ", ".join(f"{name} {ns}" for name, ns in lengths.items() if ns)
        raise ValueError(
            "Inputs, targets and sample weights must be arrays of the same positive length along "
            f"axis 0 (batched, if they come from a data set). Received: lengths {given}"
        )


def _shape_length(array):
    shape = np.shape(array)
    return int(shape[0]) if len(shape) else None


def mapped(function, batch):
    """`function` of each array of a batch."""
    return keras.tree.map_structure(lambda a: None if a is None else function(a), batch)


def joined(*batches):
    """Batches as one, along axis 0.

    Raises:
        ValueError: their examples have unlike shapes.
    """
    try:
        return keras.tree.map_structure(
            lambda *a: None if a[0] is None else np.concatenate(a), *batches
        )
    except ValueError as error:
        raise ValueError(
            "The batches of `data` have examples of unlike shapes, as padded_batch makes them. "
            f"Expected one shape, such as sequences padded to one length. Received: {error}"
        ) from error


def length(batch):
    """How many examples a batch has."""
    return len(next(a for a in keras.tree.flatten(batch) if a is not None))


_OTHER = (
    "`data` gave other examples than before in its batch {}, and D needs several passes. Expected "
    "the same examples in the same order each time: no shuffling (or shuffle(..., "
    "reshuffle_each_iteration=False)), no random augmentation, and no iterator that ends for good."
)


class Batches:
    """Passes over a data set, `batch_size` examples at a time, whatever its own batches are.

    Args:
        data: as in `read`; data sets are read anew in each pass.
        examples: how many to take: of arrays, drawn without replacement; of data sets, the first.
            `None` for all.
        batch_size: of the batches that come out.
        seed: for the drawing.

    Attributes:
        count: N, how many examples there are.
        batch_size: as given.

    Raises:
        ValueError: `data` is not what is described here, has no end, or differs between passes.
    """

    def __init__(self, data, *, examples, batch_size, seed):
        self._data, self._examples, self.batch_size = data, examples, batch_size
        self._checksums = None
        if isinstance(data, tuple | list):
            (arrays,) = read(data)
            arrays = mapped(as_array, arrays)
            if examples is not None and examples < length(arrays):
                rng = np.random.default_rng(seed)
                chosen = np.sort(rng.choice(length(arrays), examples, replace=False))
                arrays = mapped(lambda a: a[chosen], arrays)
            self._read = lambda: [arrays]
        else:
            if examples is None and _is_endless(data):
                raise ValueError(
                    "`data` repeats without end. Expected a data set that ends, or `examples`, "
                    "how many to read. Received: examples=None"
                )
            self._read = self._read_unchanged
        self.count = sum(length(batch) for batch in self._read())
        if not self.count:
            raise ValueError("`data` has no examples.")

    def first(self, n):
        """The first n examples, or all if there are fewer: (x, y, sample_weight)."""
        return next(self.after(batch_size=n))

    def steps(self, start=0, batch_size=None):
        """How many batches `after(start, batch_size)` has."""
        return -(-(self.count - start) // (batch_size or self.batch_size))

    def after(self, start=0, batch_size=None):
        """One pass from example `start` on, each batch (x, y, sample_weight)."""
        size, held, skip = batch_size or self.batch_size, None, start
        for batch in self._read():
            n = length(batch)
            if skip < n:
                batch = mapped(lambda a, skip=skip: a[skip:], batch)
                held = batch if held is None else joined(held, batch)
                whole = length(held) // size * size
                for at in range(0, whole, size):
                    yield mapped(lambda a, at=at: a[at : at + size], held)
                rest = mapped(lambda a, whole=whole: a[whole:], held)
                held = rest if length(rest) else None
            skip = max(skip - n, 0)
        if held is not None:
            yield held

    def _read_unchanged(self):
        """The data set's own batches, which must be the same in each pass."""
        left, checksums = self._examples, []
        for batch in read(self._data):
            batch = mapped(as_array, batch)
            if left is not None:
                batch = mapped(lambda a, left=left: a[:left], batch)
                left -= length(batch)
            checksums.append(_checksum(batch))
            at = len(checksums)
            if self._checksums is not None and checksums[-1:] != self._checksums[at - 1 : at]:
                raise ValueError(_OTHER.format(at - 1))
            yield batch
            if left == 0:
                break
        if self._checksums is not None and len(checksums) != len(self._checksums):
            raise ValueError(_OTHER.format(len(checksums)))
        self._checksums = checksums


def as_array(value):
    """As numpy holds it, if it is not on disk; strings in Python objects as bytes.

    Raises:
        ValueError: it holds neither numbers nor strings.
    """
    if type(value).__module__.startswith("h5py"):
        return value
    array = np.asarray(value)
    if array.dtype != object:
        return array
    # A data set's strings come as bytes, a pandas column's as str.
    if not all(isinstance(text, str | bytes) for text in array.flat):
        raise ValueError(
            "Expected arrays or tensors of numbers or strings. "
            f"Received: an array of dtype object, shape {array.shape}"
        )
    encoded = np.empty_like(array)
    encoded.flat = [text.encode() if isinstance(text, str) else text for text in array.flat]
    return encoded


def _is_endless(data):
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is None
    # tf.data.INFINITE_CARDINALITY
    return _is_tf_dataset(data) and int(data.cardinality()) == -1


def _is_tf_dataset(data):
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(data, tf.data.Dataset)


def _checksum(batch):
    value = 0
    for a in keras.tree.flatten(batch):
        if a is not None:
            content = b"\0".join(a.flat) if a.dtype == object else np.ascontiguousarray(a)
            value = zlib.crc32(content, value)
    return value

"""Per-example gradients one example a lane: the whole model under `tf.vectorized_map`.

The loss is taken once over the batch, so that f_i is the batch's own f_i; a lane runs the model
on one example and pulls back the cotangent d(sum_j dL/du_j)/dy_i of that example's output, and
N times that is grad f_i, exactly where examples do not mix, in the model or in the loss, and where
a forward pass draws nothing random; `checks` refuses the rest by name.
"""

import contextlib
import functools

import keras
import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd.per_example.gradients import centered, gram_of_rows, products
from keras_rgd.per_example.loss_weights import what_losses_read
from keras_rgd.per_example.tensorflow_gradients import TensorFlowGradients
from keras_rgd.per_example.way import Way

# A batched matrix product that vectorizing makes out of attention crashes the process in TF's
# CPU kernels with oneDNN on (a segmentation fault, no exception); XLA's are sound.
CRASH_UNCOMPILED = {"Einsum", "XlaEinsum", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}

# What tf.vectorized_map fails on, after long tracing and pages of log; loops also under XLA only.
NOT_VECTORIZED = {"While", "StatelessWhile", "DepthwiseConv2dNative", "Conv3D"}


def vectorized_map_way(losses, reason, chunk_size=None, compiled=False):
    """The `Way` "vectorized_map", for a model that `check_vectorized_map` has passed.

    Args:
        losses: the `ExampleLosses` of the model.
        reason: why it was chosen.
        chunk_size: examples whose gradients are held at once. Defaults to `None`, all.
        compiled: whether the caller compiles what it traces with XLA. Defaults to `False`.
    """
    rows = rows_function(losses, vectorized, compiled)
    make = functools.partial(VectorizedMap, losses, chunk_size=chunk_size, rows=rows)
    return Way("vectorized_map", reason, make)


class VectorizedMap(TensorFlowGradients):
    """Rows g_i of G, in chunks of `chunk_size` examples.

    Args:
        losses: the `ExampleLosses` of a model whose examples do not mix.
        batch: a `Batch`.
        loss_scale: factor that keeps half-precision gradients in range; it cancels.
        chunk_size: examples whose gradients are held at once. One chunk is computed once and
            kept; several are computed again for each operation, so that N d need not fit in
            memory. Defaults to `None`, all N.
        rows: the function that makes rows from a chunk; see `rows_function`.
        way: the name this goes by.
    """

    gram_is_cheap = True

    def __init__(self, losses, batch, loss_scale=1.0, *, chunk_size, rows, way="vectorized_map"):
        self.way = way
        self.weights = losses.weights
        self.n_examples = batch.size
        self._scale = tf.cast(loss_scale, self.dtype)
        self._rows_function = rows
        self._n = tf.cast(self.n_examples, self.dtype)
        cotangents, r_gradient = self._batch_pass(losses, batch)
        self._chunk_size = chunk_size
        if chunk_size is None:
            self._rows = self._rows_of((batch.x, cotangents))
        else:
            self._chunks = _split((batch.x, cotangents), self.n_examples, chunk_size)
        # In chunks each mean is a pass over all examples.
        self._mean = super().mean()
        self.gradient = self._mean
        if r_gradient is not None:
            self.gradient = vectors.add(self._mean, r_gradient)

    def _batch_pass(self, losses, batch):
        """One forward pass: the cotangents of the outputs, and grad r where there is an r."""
        u = tf.ones([self.n_examples], self.dtype)
        with tf.GradientTape(persistent=True) as tape:
            with tape.stop_recording():
                self.y_pred = losses.forward(batch.x)
            if losses.model.losses:  # known only after a forward pass; r then needs a recorded one
                self.y_pred = losses.forward(batch.x)
            outputs = what_losses_read(self.y_pred)
            tape.watch(outputs)
            self.loss, derivatives = losses(batch, self.y_pred, u)
            f_mean = tf.reduce_sum(tf.cast(derivatives, self.dtype))
            scaled = self._scale * f_mean
            r = tf.cast(self.loss, self.dtype) - f_mean
        # Outputs without a loss get a cotangent of zeros.
        zero = tf.UnconnectedGradients.ZERO
        cotangents = tape.gradient(scaled, outputs, unconnected_gradients=zero)
        r_gradient = None
        if losses.model.losses:
            r_gradient = self.cast(tape.gradient(r, self.weights, unconnected_gradients=zero))
        return cotangents, r_gradient

    def _rows_of(self, chunk):
        return vectors.scale(self.cast(self._rows_function(*chunk)), self._n / self._scale)

    def _dot(self, v):
        if self._chunk_size is None:
            return _dot(self._rows, v)
        k = tf.map_fn(
            lambda chunk: _dot(self._rows_of(chunk), v),
            self._chunks,
            fn_output_signature=self.dtype,
        )
        return tf.reshape(k, [-1])[: self.n_examples]

    def _combine(self, w):
        if self._chunk_size is None:
            return _combine(w, self._rows)
        # Weight zero for the last chunk's filling.
        n = tf.shape(keras.tree.flatten(self._chunks)[0])[0] * self._chunk_size
        w = tf.reshape(tf.pad(w, [[0, n - self.n_examples]]), [-1, self._chunk_size])
        return tf.foldl(
            lambda total, part: vectors.add(total, _combine(part[1], self._rows_of(part[0]))),
            (self._chunks, w),
            initializer=[tf.zeros(w.shape, self.dtype) for w in self.weights],
        )

    def rows(self):
        if self._chunk_size is None:
            return self._rows
        signature = [tf.TensorSpec([self._chunk_size, *w.shape], self.dtype) for w in self.weights]
        rows = tf.map_fn(self._rows_of, self._chunks, fn_output_signature=signature)
        pairs = zip(rows, self.weights, strict=True)
        return [tf.reshape(r, [-1, *w.shape])[: self.n_examples] for r, w in pairs]

    def mean(self):
        return self._mean

    def combine_many(self, w):
        if self._chunk_size is None:
            return _combine(w, self._rows)
        return super().combine_many(w)

    def gram(self, center=None, unit=1.0):
        if self._chunk_size is None:
            return gram_of_rows(self._rows, center, unit)

        def rows(chunk):
            return centered(self._rows_of(chunk), center, unit)

        def row_of_blocks(chunk):
            own = rows(chunk)
            return tf.map_fn(
                lambda other: products(own, rows(other)),
                self._chunks,
                fn_output_signature=self.dtype,
            )

        blocks = tf.map_fn(row_of_blocks, self._chunks, fn_output_signature=self.dtype)
        n = tf.shape(blocks)[0] * self._chunk_size
        gram = tf.reshape(tf.transpose(blocks, [0, 2, 1, 3]), [n, n])
        return gram[: self.n_examples, : self.n_examples]


def _dot(rows, v):
    return products(rows, [x[None] for x in v])[:, 0]


def _combine(w, rows):
    return [tf.tensordot(w, r, 1) for r in rows]


def _split(tensors, n, chunk_size):
    """The tensors (N, ...) as (chunks, chunk_size, ...), the last chunk filled with example 0.

    What is computed for the filling is cut off again, or has weight zero.
    """
    n_chunks = -(-n // chunk_size)
    filling = n_chunks * chunk_size - n

    def split(tensor):
        tensor = tf.convert_to_tensor(tensor)
        index = tf.concat([tf.range(n), tf.zeros([filling], tf.int32)], 0)
        shape = tf.concat([[n_chunks, chunk_size], tf.shape(tensor)[1:]], 0)
        chunks = tf.reshape(tf.gather(tensor, index), shape)
        return tf.ensure_shape(chunks, [None, chunk_size, *tensor.shape[1:]])

    return keras.tree.map_structure(split, tensors)


def rows_function(losses, mapping, compiled=False):
    """The function from a chunk (x, cotangents) to the chunk's rows of G.

    Args:
        losses: the `ExampleLosses` of a model.
        mapping: `vectorized` or `one_by_one`.
        compiled: whether the caller is compiled with XLA already.

    Returns:
        A function of inputs (n, ...) and a list of cotangents (n, ...) that returns a list of
        tensors (n, *weight shape).
    """
    weights = losses.weights

    def lane(example):
        x, cotangents = example
        with tf.GradientTape() as tape:
            y = losses.forward(keras.tree.map_structure(lambda t: t[None], x))
            outputs = [t[0] for t in what_losses_read(y)]
        gradient = tape.gradient(
            outputs, weights, cotangents, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        # The shape is lost where the batch's is not known.
        return [tf.ensure_shape(g, w.shape) for g, w in zip(gradient, weights, strict=True)]

    signature = [tf.TensorSpec(w.shape, w.dtype) for w in weights]
    return mapping(lane, signature, compiled)


def vectorized(lane, signature, compiled):
    """`tf.vectorized_map` of `lane`, compiled with XLA where TF's own kernels crash.

    Raises (the function that is returned, when it is traced):
        ValueError: an operation that `tf.vectorized_map` cannot run, by its name.
    """

    def rows(*chunk):
        used = _operations(lane, chunk)
        if used & NOT_VECTORIZED:
            raise ValueError(
                f"tf.vectorized_map has no rule for {', '.join(sorted(used & NOT_VECTORIZED))}"
            )
        with quiet():
            mapped = tf.vectorized_map(lane, chunk, fallback_to_while_loop=False)
        crashes.append(bool(used & CRASH_UNCOMPILED))
        return mapped

    crashes = []
    if compiled:
        return rows
    plain = tf.function(rows, reduce_retracing=True, autograph=False)
    with_xla = tf.function(rows, reduce_retracing=True, autograph=False, jit_compile=True)

    def sound_rows(*chunk):
        if not crashes:
            plain.get_concrete_function(*chunk)  # traces, runs nothing
        return (with_xla if crashes[0] else plain)(*chunk)

    return sound_rows


@contextlib.contextmanager
def quiet():
    """Without TensorFlow's pages of log on what it vectorizes; errors are raised all the same."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(level)


def _operations(lane, chunk):
    """The types of the operations of `lane` on one example of `chunk`, loops' insides included."""
    specs = keras.tree.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), chunk)
    graph = tf.function(lane, autograph=False).get_concrete_function(specs).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes}


def one_by_one(lane, signature, compiled):
    """`lane` of one example after another: any layer, one backward pass an example."""

    def rows(*chunk):
        return tf.map_fn(lane, chunk, fn_output_signature=signature)

    return rows if compiled else tf.function(rows, reduce_retracing=True, autograph=False)

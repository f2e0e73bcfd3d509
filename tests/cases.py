"""The cases of the layer matrix: a small model, its data and its loss for each kind of layer."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from case_models import (
    BINARY,
    CROSSENTROPY,
    FLAT,
    HEAD,
    MEAN1D,
    TANH,
    AddsLoss,
    N,
    Sizes,
    Squares,
    Subclassed,
    T,
    attention,
    dictionaries,
    frozen,
    layer,
    nested,
    one_loss,
    one_output_without_loss,
    own_loss,
    sequential,
    shared,
    small_sigmoid,
    transformer,
    two_by_two,
)
from keras import layers as L


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that RGD trains, on one batch."""

    name: str
    row: str  # of the table in README.md
    build: Callable  # () -> an uncompiled model
    data: Callable  # numpy Generator -> (x, y)
    loss: object = "mse"  # names or makers of losses, structured as the outputs
    loss_shape: object = ()  # of each loss's values, behind the batch axis
    loss_weights: object = None
    sample_weight: Callable | None = None  # numpy Generator -> weights
    class_weight: dict | None = None
    random: bool = False  # layers draw random numbers
    refusable: str | None = None  # the class that vectorized_map may refuse, by this name
    opaque: bool = False  # layerwise must refuse this class, and nothing else

    def __str__(self):
        return self.name

    def batch(self):
        """(x, y, sample_weight) in float32, the same each time; class weights included."""
        rng = np.random.default_rng(1)
        x, y = self.data(rng)
        weights = None if self.sample_weight is None else self.sample_weight(rng)
        if self.class_weight is not None:
            weights = np.array([self.class_weight[int(c)] for c in y])
        return x, y, weights

    def model(self):
        """The built, uncompiled model; the same weights each time, none of them 0."""
        keras.utils.set_random_seed(7)
        model = self.build()
        rng = np.random.default_rng(2)
        if not model.built or not model.weights:
            model(keras.tree.map_structure(lambda a: a[:1], self.batch()[0]))
        for w in model.trainable_variables:
            w.assign(w.numpy() + 0.2 * rng.normal(size=w.shape).astype("float32"))
        return model

    def compile(self, model, optimizer, **kwargs):
        loss = keras.tree.map_structure(lambda f: f() if callable(f) else f, self.loss)
        model.compile(optimizer, loss=loss, loss_weights=self.loss_weights, **kwargs)
        return model


def normal(*shape):
    return lambda rng: rng.normal(size=(N, *shape)).astype("float32")


def integers(high, *shape):
    return lambda rng: rng.integers(1, high, size=(N, *shape)).astype("int32")


def padded_integers(rng):
    """Sequences of 1..9 with 0 to fill, of unlike lengths."""
    x = rng.integers(1, 10, size=(N, T)).astype("int32")
    for i in range(N):
        x[i, 1 + i % T :] = 0
    return x


def xy(x, y):
    return lambda rng: (x(rng), y(rng))


def classes(rng):
    return rng.integers(0, 3, size=(N,)).astype("int32")


def positive(*shape):
    return lambda rng: rng.uniform(0.2, 2.0, size=(N, *shape)).astype("float32")


def _classifier(name, row, shape, *stack, **kwargs):
    return Case(
        name,
        row,
        sequential(shape, *stack, HEAD),
        xy(normal(*shape), classes),
        loss=CROSSENTROPY,
        **kwargs,
    )


def _dense(name, row, **kwargs):
    return _classifier(name, row, (5,), TANH, **kwargs)


def _recurrent(name, row, *stack, **kwargs):
    kwargs.setdefault("refusable", row)
    kwargs.setdefault("opaque", True)
    return _classifier(name, row, (T, 3), *stack, **kwargs)


CASES = [
    _dense("dense", "Dense"),
    Case(
        "softmax",
        "Dense",
        sequential((5,), TANH, layer(L.Dense, 3, activation="softmax")),
        xy(normal(5), classes),
        loss="sparse_categorical_crossentropy",
    ),
    Case(
        "dense_regression",
        "Dense",
        sequential((5,), layer(L.Dense, 4, activation="gelu"), layer(L.Dense, 2)),
        xy(normal(5), normal(2)),
    ),
    Case(
        "einsum_dense_prelu",
        "EinsumDense, PReLU",
        sequential(
            (T, 3),
            layer(L.EinsumDense, "abc,cd->abd", (T, 4), bias_axes="d"),
            layer(L.PReLU, shared_axes=[1]),
            FLAT,
            HEAD,
        ),
        xy(normal(T, 3), classes),
        loss=CROSSENTROPY,
    ),
    _classifier("conv1d", "Conv1D", (7, 2), layer(L.Conv1D, 3, 3, activation="tanh"), MEAN1D),
    _classifier(
        "conv2d",
        "Conv2D",
        (6, 6, 2),
        layer(L.Conv2D, 3, 3, strides=2, padding="same", activation="tanh"),
        FLAT,
    ),
    _classifier(
        "conv1d_groups",
        "Conv1D(groups=2)",
        (7, 4),
        layer(L.Conv1D, 6, 3, groups=2, padding="same", activation="tanh"),
        MEAN1D,
        refusable="Conv1D",
    ),
    _classifier(
        "conv2d_groups",
        "Conv2D(groups=2)",
        (5, 5, 4),
        layer(L.Conv2D, 6, 3, groups=2, activation="tanh"),
        layer(L.Conv2D, 6, 2, groups=6, activation="tanh"),
        FLAT,
        refusable="Conv2D",
    ),
    _classifier(
        "conv3d",
        "Conv3D",
        (4, 4, 4, 1),
        layer(L.Conv3D, 2, 2, activation="tanh"),
        FLAT,
        refusable="Conv3D",
    ),
    _classifier(
        "depthwise_conv1d",
        "DepthwiseConv1D",
        (6, 2),
        layer(L.DepthwiseConv1D, 3, activation="tanh"),
        FLAT,
        refusable="DepthwiseConv1D",
    ),
    _classifier(
        "depthwise_conv2d",
        "DepthwiseConv2D",
        (5, 5, 2),
        layer(L.DepthwiseConv2D, 3, activation="tanh"),
        FLAT,
        refusable="DepthwiseConv2D",
    ),
    _classifier(
        "separable_conv1d",
        "SeparableConv1D",
        (6, 2),
        layer(L.SeparableConv1D, 3, 3, activation="tanh"),
        FLAT,
        refusable="SeparableConv1D",
    ),
    _classifier(
        "separable_conv2d",
        "SeparableConv2D",
        (5, 5, 2),
        layer(L.SeparableConv2D, 3, 3, activation="tanh"),
        FLAT,
        refusable="SeparableConv2D",
    ),
    _classifier(
        "conv1d_transpose",
        "Conv1DTranspose",
        (4, 2),
        layer(L.Conv1DTranspose, 3, 3, strides=2, activation="tanh"),
        FLAT,
        refusable="Conv1DTranspose",
    ),
    _classifier(
        "conv2d_transpose",
        "Conv2DTranspose",
        (3, 3, 2),
        layer(L.Conv2DTranspose, 2, 3, strides=2, activation="tanh"),
        FLAT,
        refusable="Conv2DTranspose",
    ),
    _classifier(
        "conv3d_transpose",
        "Conv3DTranspose",
        (2, 2, 2, 2),
        layer(L.Conv3DTranspose, 2, 2, activation="tanh"),
        FLAT,
        refusable="Conv3DTranspose",
    ),
    _classifier(
        "pooling",
        "MaxPooling2D, AveragePooling2D, UpSampling2D",
        (8, 8, 1),
        layer(L.Conv2D, 2, 3, padding="same", activation="tanh"),
        layer(L.MaxPooling2D),
        layer(L.Conv2D, 2, 3, padding="same", activation="relu"),
        layer(L.AveragePooling2D, 2),
        layer(L.UpSampling2D),
        layer(L.GlobalMaxPooling2D),
        refusable="MaxPooling2D",
    ),
    _classifier(
        "batch_normalization",
        "BatchNormalization (training)",
        (5,),
        layer(L.Dense, 4),
        layer(L.BatchNormalization),
        layer(L.Activation, "tanh"),
        refusable="BatchNormalization",
        opaque=True,
    ),
    _classifier(
        "batch_normalization_conv",
        "BatchNormalization (training)",
        (6, 6, 1),
        layer(L.Conv2D, 3, 3, use_bias=False),
        layer(L.BatchNormalization),
        layer(L.Activation, "relu"),
        layer(L.GlobalAveragePooling2D),
        refusable="BatchNormalization",
        opaque=True,
    ),
    _classifier(
        "layer_normalization",
        "LayerNormalization",
        (5,),
        layer(L.Dense, 4),
        layer(L.LayerNormalization),
        layer(L.Activation, "tanh"),
    ),
    _classifier(
        "group_normalization",
        "GroupNormalization",
        (4, 4, 2),
        layer(L.Conv2D, 4, 3),
        layer(L.GroupNormalization, groups=2),
        layer(L.Activation, "tanh"),
        FLAT,
    ),
    _classifier(
        "dropout",
        "Dropout",
        (5,),
        layer(L.Dense, 8, activation="tanh"),
        layer(L.Dropout, 0.5),
        random=True,
        refusable="Dropout",
    ),
    _classifier(
        "spatial_dropout",
        "SpatialDropout2D, GaussianNoise",
        (5, 5, 1),
        layer(L.GaussianNoise, 0.5),
        layer(L.Conv2D, 4, 3, activation="tanh"),
        layer(L.SpatialDropout2D, 0.5),
        FLAT,
        random=True,
        refusable="GaussianNoise",
    ),
    Case(
        "embedding",
        "Embedding",
        sequential((T,), layer(L.Embedding, 10, 3), FLAT, HEAD, dtype="int32"),
        xy(integers(10, T), classes),
        loss=CROSSENTROPY,
    ),
    Case(
        "embedding_mask_lstm",
        "Embedding(mask_zero=True), LSTM",
        sequential(
            (T,), layer(L.Embedding, 10, 3, mask_zero=True), layer(L.LSTM, 3), HEAD, dtype="int32"
        ),
        xy(padded_integers, classes),
        loss=CROSSENTROPY,
        refusable="LSTM",
        opaque=True,
    ),
    Case(
        "embedding_mask_loss",
        "Embedding(mask_zero=True), masked loss over time",
        sequential((T,), layer(L.Embedding, 10, 3, mask_zero=True), TANH, HEAD, dtype="int32"),
        xy(padded_integers, integers(3, T)),
        loss=CROSSENTROPY,
        loss_shape=(T,),
    ),
    Case(
        "multi_head_attention",
        "MultiHeadAttention",
        attention,
        xy(normal(T, 4), classes),
        loss=CROSSENTROPY,
        refusable="MultiHeadAttention",
    ),
    Case(
        "transformer",
        "MultiHeadAttention with masks and Dropout",
        transformer,
        xy(padded_integers, integers(3, T)),
        loss=CROSSENTROPY,
        loss_shape=(T,),
        random=True,
        refusable="Dropout",
    ),
    _recurrent("simple_rnn", "SimpleRNN", layer(L.SimpleRNN, 3)),
    _recurrent("lstm", "LSTM", layer(L.LSTM, 3)),
    _recurrent("gru", "GRU", layer(L.GRU, 3)),
    _recurrent(
        "lstm_unrolled",
        "LSTM(unroll=True)",
        layer(L.LSTM, 3, unroll=True),
        refusable="LSTM",
        opaque=False,
    ),
    _recurrent(
        "lstm_dropout",
        "LSTM with dropout",
        layer(L.LSTM, 3, dropout=0.3, recurrent_dropout=0.3),
        random=True,
        refusable="LSTM",
    ),
    _recurrent(
        "bidirectional",
        "Bidirectional(GRU)",
        lambda: L.Bidirectional(L.GRU(2, return_sequences=True)),
        MEAN1D,
        refusable="GRU",
    ),
    _classifier(
        "time_distributed",
        "TimeDistributed",
        (T, 3),
        lambda: L.TimeDistributed(L.Dense(3, activation="tanh")),
        MEAN1D,
        refusable="TimeDistributed",
    ),
    Case(
        "shared_layer",
        "shared layers",
        shared,
        lambda rng: ([normal(3)(rng), normal(3)(rng)], normal(2)(rng)),
    ),
    Case("nested_model", "nested models", nested, xy(normal(4), normal(2))),
    Case(
        "two_inputs_two_outputs",
        "several inputs and outputs, `loss_weights`",
        two_by_two,
        lambda rng: ([normal(3)(rng), normal(2)(rng)], [normal(2)(rng), classes(rng)]),
        loss=["mse", CROSSENTROPY],
        loss_weights=[0.3, 2.0],
        loss_shape=[(), ()],
        sample_weight=lambda rng: [positive()(rng), positive()(rng)],
    ),
    Case(
        "dictionaries",
        "several inputs and outputs, `loss_weights`",
        dictionaries,
        lambda rng: (
            {"a": normal(3)(rng), "b": normal(T, 2)(rng)},
            {"p": rng.integers(0, 2, (N, 1)).astype("float32"), "q": normal(T, 2)(rng)},
        ),
        loss={"p": BINARY, "q": "mae"},
        loss_weights={"p": 0.5, "q": 3.0},
        loss_shape={"p": (), "q": (T,)},
    ),
    Case(
        "one_loss_object",
        "several inputs and outputs, `loss_weights`",
        two_by_two,
        lambda rng: ([normal(3)(rng), normal(2)(rng)], [normal(2)(rng), normal(3)(rng)]),
        loss=[one_loss, one_loss],
        loss_shape=[(), ()],
    ),
    Case(
        "output_without_loss",
        "several inputs and outputs, `loss_weights`",
        one_output_without_loss,
        lambda rng: (normal(3)(rng), {"p": normal(2)(rng)}),
        loss={"p": "mse"},
        loss_shape={"p": ()},
    ),
    Case(
        "small_sigmoid",
        "several inputs and outputs, `loss_weights`",
        small_sigmoid,
        lambda rng: (
            normal(3)(rng),
            [normal(2)(rng), rng.integers(0, 2, (N, 1)).astype("float32")],
        ),
        loss=["mse", "binary_crossentropy"],
        loss_weights=[1.0, 0.01],
        loss_shape=[(), ()],
    ),
    _dense("sample_weight", "`sample_weight`, `class_weight`", sample_weight=positive()),
    _dense(
        "class_weight", "`sample_weight`, `class_weight`", class_weight={0: 0.3, 1: 1.0, 2: 4.0}
    ),
    _classifier("add_loss", "`add_loss`", (5,), TANH, layer(AddsLoss)),
    _classifier(
        "regularizers",
        "regularizers, activity regularizers",
        (5,),
        layer(
            L.Dense, 4, activation="tanh", kernel_regularizer=Squares(), bias_regularizer=Sizes()
        ),
    ),
    _classifier(
        "activity_regularizer",
        "regularizers, activity regularizers",
        (5,),
        lambda: L.Dense(4, activation="tanh", activity_regularizer=keras.regularizers.L2(0.3)),
    ),
    Case("frozen_layer", "frozen layers", frozen, xy(normal(5), classes), loss=CROSSENTROPY),
    Case(
        "loss_over_time",
        "losses over time (N, T)",
        sequential((T, 3), TANH, HEAD),
        xy(normal(T, 3), normal(T, 3)),
        loss_shape=(T,),
    ),
    Case(
        "loss_over_time_n_is_t",
        "losses over time (N, T)",
        sequential((N, 3), TANH, HEAD),
        xy(normal(N, 3), normal(N, 3)),
        loss_shape=(N,),
    ),
    Case(
        "weights_over_time",
        "losses over time (N, T)",
        sequential((T, 3), TANH, HEAD),
        xy(normal(T, 3), normal(T, 3)),
        loss_shape=(T,),
        sample_weight=positive(T),
    ),
    Case(
        "weighted_examples_over_time",
        "losses over time (N, T)",
        sequential((T, 3), TANH, HEAD),
        xy(normal(T, 3), normal(T, 3)),
        loss_shape=(T,),
        sample_weight=positive(1),
    ),
    Case(
        "loss_over_pixels",
        "losses over time (N, T)",
        sequential(
            (4, 4, 1), layer(L.Conv2D, 3, 3, padding="same", activation="tanh"), layer(L.Dense, 1)
        ),
        xy(normal(4, 4, 1), lambda rng: rng.integers(0, 2, (N, 4, 4, 1)).astype("float32")),
        loss=functools.partial(BINARY, reduction="sum"),
        loss_shape=(4, 4),
    ),
    Case(
        "subclassed",
        "subclassed models",
        Subclassed,
        xy(normal(5), classes),
        loss=CROSSENTROPY,
    ),
    Case(
        "own_compute_loss",
        "a `compute_loss` of one's own",
        own_loss,
        xy(normal(4), normal(2)),
        loss=None,
        refusable="OwnLoss",
    ),
]

BY_NAME = {case.name: case for case in CASES}

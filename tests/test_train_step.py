"""The training step on what programs hand it: data made in it, none, odd batches, other steps."""

import inspect

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from keras import layers as L
from wide import swept

import keras_rgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings("ignore:`build\\(\\)` was called"),
]

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 8)).astype("float32"), RNG.integers(0, 3, 12)
WAYS = ("layerwise", "double_backward", "vectorized_map", "pieces")


def options(way):
    return {"microbatch_size": 3} if way == "pieces" else {"per_example": way}


def classifier(optimizer, *stack, loss=None, **kwargs):
    keras.utils.set_random_seed(1)
    model = keras_rgd.RGDSequential([keras.Input((8,)), *stack, L.Dense(3)])
    model.compile(optimizer, loss or cases.CROSSENTROPY(), **kwargs)
    return model


def direction(G, epsilon):
    v, H = G.mean(0), G - G.mean(0)
    return v - epsilon * H.T @ (H @ v) / len(G)


def rows(model, losses):
    """The gradient of each loss, float64, one at a time."""
    weights = [w.value for w in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        separate = tf.unstack(losses())
    return np.array([reference.flatten([tape.gradient(f, w) for w in weights]) for f in separate])


def crossentropy(model, x, y):
    return lambda: keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)


# a train_step of one's own that prepares the data


class Denoiser(keras_rgd.RGDMixin, keras.Model):
    """Its inputs and targets are made in `train_step`."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = L.Dense(4, activation="tanh"), L.Dense(8)

    def build(self, shape):
        self.hidden.build(shape)
        self.out.build((None, 4))

    def call(self, x):
        return self.out(self.hidden(x))

    def train_step(self, data):
        return super().train_step((0.5 * data, data))


class Cropped(Denoiser):
    """A dict of columns, of which it makes x, y and sample weights."""

    def __init__(self):
        super().__init__()
        self.out = L.Dense(3)

    def train_step(self, data):
        weights = 1 + tf.cast(data["label"], "float32")
        return keras_rgd.RGDMixin.train_step(self, (data["x"][:, :5], data["label"], weights))


@pytest.mark.parametrize("way", swept(["auto", *WAYS], ["auto", "double_backward"]))
def test_inputs_and_targets_made_in_train_step(way):
    model, optimizer = Denoiser(), keras_rgd.RGD(1.0, **options(way))
    model.compile(optimizer, "mse")
    model.fit(X, batch_size=5, shuffle=False, verbose=0)  # builds it; batches of unlike sizes
    G = rows(model, lambda: tf.reduce_mean(tf.square(model(0.5 * X[:6]) - X[:6]), -1))
    step = steps.moved(model, lambda: model.fit(X[:6], batch_size=6, verbose=0))
    expected = direction(G, float(optimizer.chosen_epsilon))
    assert reference.relative_error(step, expected) < 1e-5


@pytest.mark.parametrize("way", ["auto", "double_backward"])
def test_a_dict_of_columns_split_in_train_step(way):
    model, optimizer = Cropped(), keras_rgd.RGD(1.0, per_example=way)
    model.compile(optimizer, cases.CROSSENTROPY())
    data = {"x": X, "label": Y.astype("int32")}
    model.fit(data, batch_size=5, shuffle=False, verbose=0)
    f = crossentropy(model, X[:, :5], Y)
    G = rows(model, lambda: f() * (1.0 + Y))
    step = steps.moved(model, lambda: model.fit(data, batch_size=12, shuffle=False, verbose=0))
    assert reference.relative_error(step, direction(G, float(optimizer.chosen_epsilon))) < 1e-5


def test_looking_at_the_prepared_data_draws_nothing():
    class Noisy(Denoiser):
        def __init__(self):
            super().__init__()
            self.seed = keras.random.SeedGenerator(3)

        def train_step(self, data):
            noise = keras.random.normal(tf.shape(data), seed=self.seed)
            return keras_rgd.RGDMixin.train_step(self, (data + noise, data))

    seeds = []
    for optimizer in (keras.optimizers.SGD(0.1), keras_rgd.RGD(0.1)):
        model = Noisy()
        model.compile(optimizer, "mse")
        model.fit(X, batch_size=4, verbose=0)
        seeds.append(model.seed.state.numpy())
    np.testing.assert_array_equal(*seeds)


# a train_step of one's own that takes its own step


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([L.Dense(2), L.Dense(8)])

    def call(self, x):
        return self.net(x)

    def train_step(self, data):
        data = data[0] if isinstance(data, tuple) else data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(data, training=True) - data))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class MixinFirst(keras_rgd.RGDMixin, Own):
    pass


class MixinInPlace(keras_rgd.RGDMixin, keras.Model):
    call = Own.call

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([L.Dense(2), L.Dense(8)])

    def train_step(self, data):
        return Own.train_step(self, data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Own, "Where the model's class overrides `train_step`"),
        (MixinInPlace, "`MixinInPlace.train_step` takes a step of its own"),
        (MixinFirst, "`MixinFirst` puts RGDMixin before `Own`, which overrides `train_step`"),
    ],
)
def test_a_step_of_its_own_is_refused_with_the_ways_out(make, words):
    model = make()
    model(X)
    model.compile(keras_rgd.RGD(0.1), "mae")
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError) as refusal:
        model.fit(X, X, batch_size=4, verbose=0)
    for word in (words, "`compute_loss`", "per_example_gradients", "window=32"):
        assert word in str(refusal.value)
    np.testing.assert_array_equal(before, reference.flatten(model.trainable_variables))
    # As the message says.
    model = make()
    model(X)
    model.compile(keras_rgd.RGD(0.1, window=4))
    assert np.isfinite(model.fit(X, batch_size=4, verbose=0).history["loss"][0])


def test_an_error_of_the_preparation_itself_is_not_replaced():
    class Broken(Denoiser):
        def train_step(self, data):
            raise ValueError("no such column")

    model = Broken()
    model.compile(keras_rgd.RGD(0.1), "mse")
    with pytest.raises(ValueError, match="no such column"):
        model.fit(X, verbose=0)


# data of other kinds


class Autoencoder(keras_rgd.RGDMixin, keras.Model):
    """No targets: its loss is its own."""

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([L.Dense(2), L.Dense(8)])

    def call(self, x):
        return self.net(x["a"] if isinstance(x, dict) else x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        x = x["a"] if isinstance(x, dict) else x
        losses = tf.reduce_sum(tf.square(x - y_pred), -1)
        return tf.reduce_mean(losses if sample_weight is None else losses * sample_weight)


FORMS = ["array", "data set", "data set of tuples", "dict"]


@pytest.mark.parametrize("form", swept(FORMS, ["data set of tuples", "dict"]))
def test_a_model_without_targets(form):
    model, optimizer = Autoencoder(), keras_rgd.RGD(1e-2)
    model.compile(optimizer)
    x = {"a": X} if form == "dict" else X
    data = {
        "array": X,
        "data set": tf.data.Dataset.from_tensor_slices(X).batch(5),
        "data set of tuples": tf.data.Dataset.from_tensor_slices((X,)).batch(5),
        "dict": {"a": X},
    }[form]
    model.fit(data, **({} if "set" in form else {"batch_size": 5}), verbose=0)
    assert optimizer.per_example_choice.name == "layerwise"
    G = rows(model, lambda: tf.reduce_sum(tf.square(X - model(X)), -1))
    step = steps.moved(model, lambda: model.train_on_batch(x)) / 1e-2
    assert reference.relative_error(step, direction(G, float(optimizer.chosen_epsilon))) < 1e-5


@pytest.mark.parametrize(
    "kind, way",
    swept(
        [(kind, way) for kind in ("sparse", "ragged") for way in ("auto", "double_backward")],
        [("sparse", "auto"), ("ragged", "double_backward")],
    ),
)
def test_inputs_that_are_not_dense_are_refused_by_name_before_anything_changes(kind, way):
    if kind == "sparse":
        i = keras.Input((8,), sparse=True, name="words")
        z, x = L.Dense(3)(i), tf.sparse.from_dense(X)
    else:
        if "ragged" not in inspect.signature(keras.Input).parameters:
            pytest.skip("this Keras has no ragged inputs")
        i = keras.Input((None,), dtype="int32", ragged=True, name="words")
        z = L.Dense(3)(L.GlobalAveragePooling1D()(L.Embedding(9, 3)(i)))
        x = tf.RaggedTensor.from_row_lengths(np.arange(24) % 9, [1, 3] * 6)
    model = keras_rgd.RGDModel({"words": i}, z)
    data = tf.data.Dataset.from_tensor_slices(({"words": x}, Y)).batch(4)
    model.compile(keras_rgd.RGD(0.1, per_example=way), cases.CROSSENTROPY())
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError, match=rf"x\['words'\] is {kind}.*RGD\(\.\.\., window=32\)"):
        model.fit(data, verbose=0)
    np.testing.assert_array_equal(before, reference.flatten(model.trainable_variables))
    model.compile(keras_rgd.RGD(0.1, window=4), cases.CROSSENTROPY())
    model.fit(data, verbose=0)


def odd_batches(model, sizes):
    """Fit on batches of these sizes, shapes open when the step is traced."""
    spec = tf.TensorSpec([None, *X.shape[1:]]), tf.TensorSpec([None], "int64")
    batches = [(X[:n], Y[:n]) for n in sizes]
    model.fit(tf.data.Dataset.from_generator(lambda: batches, output_signature=spec), verbose=0)


ALL_LAYERS = ("double_backward", "pieces")  # ways that serve recurrent ones too


EMPTY = [
    ("layerwise", False, None),
    *((way, False, "l2") for way in WAYS),
    *((way, True, "l2") for way in ALL_LAYERS),
]


@pytest.mark.parametrize("way, recurrent, regularizer", swept(EMPTY, [*EMPTY[:3], EMPTY[-2]]))
def test_a_batch_without_examples_takes_the_step_of_sgd(way, recurrent, regularizer):
    after = []
    for optimizer in (keras.optimizers.SGD(0.1), keras_rgd.RGD(0.1, **options(way))):
        keras.utils.set_random_seed(1)
        hidden = L.Dense(4, kernel_regularizer=regularizer)
        stack = [L.Reshape((4, 2)), L.SimpleRNN(3)] if recurrent else []
        model = classifier(optimizer, *stack, hidden)
        before = reference.flatten(model.trainable_variables)
        try:
            odd_batches(model, [0, 0])
        except ValueError as error:
            # Keras 3.16 adds up losses of shapes (0,) and () no more, with SGD either.
            if after or "Shapes must be equal rank" not in str(error):
                raise
            pytest.skip("this Keras takes no step without examples, by SGD itself")
        after.append(reference.flatten(model.trainable_variables))
    np.testing.assert_allclose(*after, rtol=1e-6)
    assert (after[0] == before).all() == (regularizer is None)


@pytest.mark.parametrize("way", swept(WAYS, ["layerwise", "double_backward"]))
def test_a_batch_without_examples_between_others(way):
    """The step after it is the step without it."""
    weights = []
    for sizes in ([4, 0, 8], [4, 8]):
        keras.utils.set_random_seed(1)
        model = classifier(keras_rgd.RGD(0.1, **options(way)), L.Dense(4, activation="tanh"))
        odd_batches(model, sizes)
        weights.append(reference.flatten(model.trainable_variables))
    assert np.isfinite(weights[0]).all()
    # In pieces M_x is iterated from where the last step ended, which the empty one forgets.
    atol = 1e-3 if way == "pieces" else 1e-7
    np.testing.assert_allclose(*weights, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shape", swept(["image", "sequence", "vector"], ["image"]))
def test_one_example_first_in_pieces_is_a_plain_gradient_step(shape):
    x = {"image": (1, 6, 6, 1), "sequence": (1, 4, 3), "vector": (1, 5)}[shape]
    stacks = {"image": [L.Conv2D(2, 3), L.Flatten()], "sequence": [L.SimpleRNN(2)], "vector": []}
    x = RNG.normal(size=x).astype("float32")
    model = keras_rgd.RGDSequential([keras.Input(x.shape[1:]), *stacks[shape], L.Dense(3)])
    optimizer = keras_rgd.RGD(1.0, microbatch_size=4)
    model.compile(optimizer, cases.CROSSENTROPY())
    (gradient,) = rows(model, crossentropy(model, x, np.array([1])))
    step = steps.moved(model, lambda: model.train_on_batch(x, np.array([1])))
    assert reference.relative_error(step, gradient) < 1e-5


# weights that are frozen and unfrozen


@pytest.mark.parametrize("way", swept(WAYS[:3], ["layerwise"]))
def test_frozen_layers_with_the_same_optimizer(way):
    optimizer = keras_rgd.RGD(1.0, **options(way))
    model = classifier(optimizer, L.Dense(6, activation="tanh", name="base"), L.Dense(4))
    model.fit(X, Y, batch_size=12, verbose=0)
    model.get_layer("base").trainable = False
    model.compile(optimizer, cases.CROSSENTROPY())
    for _ in range(2):
        G = rows(model, crossentropy(model, X, Y))
        step = steps.moved(model, lambda: model.fit(X, Y, batch_size=12, verbose=0))
        expected = direction(G, float(optimizer.chosen_epsilon))
        assert reference.relative_error(step, expected) < 1e-5


@pytest.mark.parametrize("way", swept(["auto", "pieces"], ["auto"]))
def test_weights_that_the_optimizer_does_not_know_are_refused_in_keras_words(way):
    raised = []
    for optimizer in (keras.optimizers.SGD(1.0), keras_rgd.RGD(1.0, **options(way))):
        base = L.Dense(6, name="base", trainable=False)
        model = classifier(optimizer, base)
        model.fit(X, Y, batch_size=12, verbose=0)
        base.trainable = True
        model.compile(optimizer, cases.CROSSENTROPY())
        # Keras 3.8 fails as it writes its own message.
        with pytest.raises((ValueError, NotImplementedError)) as error:
            model.fit(X, Y, batch_size=12, verbose=0)
        raised.append(error.value)
    assert type(raised[0]) is type(raised[1])
    assert str(raised[0])[:20] == str(raised[1])[:20]


@pytest.mark.parametrize("way", swept(WAYS, ["layerwise"]))
def test_a_step_retraced_after_other_layers_were_frozen_moves_those_that_train(way):
    """Layers of the same shapes: another's gradient would fit."""
    optimizer = keras_rgd.RGD(1.0, **options(way))
    stack = [L.Dense(8, activation="tanh", name=name) for name in "AB"]
    model = classifier(optimizer, *stack)
    model.fit(X, Y, batch_size=6, verbose=0)
    stack[0].trainable = False
    model.compile(optimizer, cases.CROSSENTROPY())
    model.fit(X, Y, batch_size=6, verbose=0)
    stack[0].trainable, stack[1].trainable = True, False  # no compile
    G = rows(model, crossentropy(model, X[:5], Y[:5]))
    step = steps.moved(
        model, lambda: model.fit(X[:5], Y[:5], batch_size=5, shuffle=False, verbose=0)
    )
    assert reference.relative_error(step, direction(G, float(optimizer.chosen_epsilon))) < 1e-5


# vectors


@pytest.mark.parametrize("source", ["a loop of one's own", *WAYS[:3]])
def test_a_vector_of_another_shape_is_refused_by_every_operation(source):
    model = classifier("sgd", L.Dense(4))
    if source == "a loop of one's own":
        gradients = keras_rgd.per_example_gradients(model, X, Y)
    else:
        gradients = keras_rgd.diffusion_matrix(model, X, Y, per_example=source).gradients
    w = [np.ones(v.shape) for v in model.trainable_variables]
    for v in (w[:3], np.ones(53), [], None, w + w, w[::-1]):
        with pytest.raises(ValueError, match="shaped as the trainable weights"):
            gradients.dot(v)
    for u in (np.ones(11), np.ones((2, 12)), 1.0):
        with pytest.raises(ValueError, match="`w` must have one entry for each of the 12"):
            gradients.combine(u)
    # Of float64 they are taken, as NumPy makes them.
    G = rows(model, crossentropy(model, X, Y))
    assert reference.relative_error(gradients.dot(w).numpy(), G.sum(1)) < 1e-5
    combined = reference.flatten(gradients.combine(np.arange(12.0)))
    assert reference.relative_error(combined, np.arange(12) @ G) < 1e-5


def test_weights_of_another_length_are_refused_in_a_loop_of_ones_own():
    model = classifier("sgd")
    with pytest.raises(ValueError, match=r"one axis 0.*lengths \[3, 12\]"):
        keras_rgd.per_example_gradients(model, X, Y, np.ones(3, "float32"))


def test_training_is_true_or_false_wherever_it_is_asked():
    model = classifier("sgd")
    for function in (
        lambda: keras_rgd.diffusion_matrix(model, X, Y, training="no"),
        lambda: keras_rgd.spectrum(model, (X, Y), training="no", verbose=False),
        lambda: keras_rgd.per_example_gradients(model, X, Y, training="no"),
    ):
        with pytest.raises(ValueError, match="`training` must be True or False"):
            function()


# words


def test_a_weight_inside_a_loop_is_not_said_to_mix_examples():
    class Looped(L.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(8, 8), name="w")

        def call(self, x):
            w = tf.convert_to_tensor(self.w)
            return tf.while_loop(lambda t, _: t < 2, lambda t, h: (t + 1, tf.tanh(h @ w)), (0, x))[
                1
            ]

    optimizer = keras_rgd.RGD(0.1)
    classifier(optimizer, Looped(name="looped")).train_on_batch(X, Y)
    reason = str(optimizer.per_example_choice)
    assert reason.startswith("double_backward: Layer 'looped' (Looped) uses its weight")
    assert "other examples" not in reason


def test_a_functional_model_is_called_by_a_class_of_its_users():
    i = keras.Input((8,))
    model = keras_rgd.RGDModel(i, L.Dense(3)(i))

    def ranked(y, z):
        return tf.sort(keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True))

    model.compile(keras_rgd.RGD(0.1, per_example="layerwise"), ranked)
    with pytest.raises(ValueError) as refusal:
        model.train_on_batch(X, Y)
    assert "RGDFunctional" not in str(refusal.value)


def test_the_class_that_to_rgd_advises_can_be_made():
    class Task(keras.Model):
        def __init__(self, backbone, units):
            i = keras.Input((8,))
            super().__init__(i, L.Dense(units)(backbone(i)))

    with pytest.raises(ValueError, match=r"class RGDTask\(keras_rgd.RGDMixin, Task\)"):
        keras_rgd.to_rgd(Task(L.Dense(3), 2))

    class RGDTask(keras_rgd.RGDMixin, Task):
        pass

    optimizer = keras_rgd.RGD(0.1)
    model = RGDTask(L.Dense(4), 3)
    model.compile(optimizer, cases.CROSSENTROPY())
    model.fit(X, Y, verbose=0)
    assert optimizer.per_example_choice.name == "layerwise"


@pytest.mark.parametrize("model", [None, "model.keras", L.Dense(3)])
def test_to_rgd_of_no_model(model):
    with pytest.raises(ValueError, match="Expected a keras.Model.*Received: "):
        keras_rgd.to_rgd(model)


def test_the_rgd_under_mixed_precision_is_found_in_its_wrapper():
    keras.config.set_dtype_policy("mixed_float16")
    model = classifier(keras_rgd.RGD(0.1), L.Dense(4))
    model.train_on_batch(X, Y)
    assert keras_rgd.inner_rgd(model.optimizer).per_example_choice.name == "layerwise"
    assert keras_rgd.inner_rgd(keras.optimizers.SGD()) is None

"""What is expected of Keras and TensorFlow beyond their public names, one test for each.

Where a release breaks one, the test's name says what for, and `keras_rgd/_keras` holds the name.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rgd._keras import data, graphs, models, optimizers

x, y = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")


def mlp(**options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(**{"optimizer": "sgd", "loss": "mse"} | options)
    return model


def two_outputs(loss):
    inputs = keras.Input((3,))
    outputs = {"a": keras.layers.Dense(1)(inputs), "b": keras.layers.Dense(2)(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss)
    return model


# models


def test_the_functional_class_is_that_of_a_model_of_inputs_and_outputs():
    assert type(two_outputs("mse")) is models.functional_class()
    assert type(mlp()) is not models.functional_class()


def test_to_ask_for_the_functional_class_numbers_no_model_or_layer_anew():
    def numbers():
        x = keras.Input(())
        names = x.name, keras.Model(x, -x).name, keras.layers.InputLayer(()).name
        return [int("".join(c for c in name if c.isdigit()) or 0) for name in names]

    numbers()
    apart = np.subtract(numbers(), numbers())
    before = numbers()
    models.functional_class()
    np.testing.assert_array_equal(np.subtract(before, numbers()), apart)


class Own(keras.Model):
    """A model that may be functional."""


def test_a_class_of_ones_own_given_inputs_and_outputs_becomes_functional():
    inputs = keras.Input((3,))
    outputs = -inputs  # some versions refuse inputs as outputs
    for args, kwargs in (((inputs, outputs), {}), ((), {"inputs": inputs, "outputs": outputs})):
        assert models.makes_functional(args, kwargs)
        assert isinstance(keras.Model(*args, **kwargs), models.functional_class())
    assert not models.makes_functional((), {"name": "own"})
    assert not isinstance(Own(name="own"), models.functional_class())
    assert isinstance(Own(inputs, inputs), models.functional_class())


def test_a_model_is_handed_training_where_its_call_names_it():
    class Named(keras.Model):
        def call(self, inputs, training=None):
            return training

    class Plain(keras.Model):
        def call(self, inputs):
            return inputs

    class Any(keras.Model):
        def call(self, inputs, **kwargs):
            return kwargs

    for model in (Named(), mlp(), two_outputs("mse")):
        assert models.has_training_argument(model)
        model(x, training=True)
    assert Named()(x, training=True) is True
    assert not models.has_training_argument(Plain())
    assert not models.has_training_argument(Any())
    # So that Keras itself hands nothing on.
    assert Any()(x) == {}


def test_layers_inside_of_layers_are_found_each_once():
    inner = keras.layers.LSTM(2)
    twice = keras.layers.Bidirectional(inner)
    model = keras.Sequential([keras.Input((2, 3)), twice, keras.layers.Dense(1)])
    layers = models.layers_of(model)
    assert layers[0] is model and models.layers_of(model, include_self=False) == layers[1:]
    assert {twice.forward_layer, twice.backward_layer, twice.forward_layer.cell} <= set(layers)
    assert len(set(layers)) == len(layers)
    assert layers.index(twice) < layers.index(twice.forward_layer)


def test_layers_that_draw_have_their_generator_as_an_attribute():
    layer = keras.layers.Dropout(0.5)
    (generator,) = models.seed_generators(layer)
    before = generator.state.numpy()
    layer(x, training=True)
    assert np.any(generator.state.numpy() != before)
    assert models.seed_generators(keras.layers.Dense(1)) == []


class Drawing(keras.layers.Layer):
    """Keeps its generators in a list, a dictionary and an attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.several = [keras.random.SeedGenerator(1), keras.random.SeedGenerator(2)]
        self.named = {"a": keras.random.SeedGenerator(3)}
        self.one = keras.random.SeedGenerator(4)

    def call(self, x):
        return x + sum(
            keras.random.normal((1,), seed=g) for g in (*self.several, self.named["a"], self.one)
        )


def test_generators_in_lists_and_dictionaries_are_found_once_those_of_attributes_first():
    layer = Drawing()
    assert models.seed_generators(layer) == [layer.one, *layer.several, layer.named["a"]]


def test_stateful_layers_keep_variables_that_keras_does_not_list():
    layer = keras.layers.LSTM(2, stateful=True)
    layer(np.ones((4, 2, 3), "float32"))
    states = models.recurrent_states(layer)
    assert len(states) == 2 and np.any(states[0].numpy())
    assert not {id(s) for s in states} & {id(v) for v in layer.variables}
    assert models.recurrent_states(keras.layers.Dense(1)) == []


@pytest.mark.parametrize("kind", ["layer", "loss"])
def test_keras_calls_what_stands_in_the_place_of_call(kind):
    model = mlp(loss=keras.losses.MeanSquaredError())
    seen = []

    def recording(object, call):
        def recorded(*args):
            seen.append((object, call(*args).shape))
            return call(*args)

        return recorded

    one = model.layers[0] if kind == "layer" else model.loss
    with models.calls_replaced([one, one], recording):
        loss = model.compute_loss(x, y, model(x))
    assert seen == [(one, (4, 1) if kind == "layer" else (4,))]
    assert loss.shape == ()
    model.compute_loss(x, y, model(x))
    assert len(seen) == 1


def test_a_call_of_an_instances_own_is_put_back():
    layer = keras.layers.Dense(1)
    layer(x)
    layer.call = own = lambda inputs: inputs
    with models.calls_replaced([layer], lambda layer, call: call):
        pass
    assert vars(layer)["call"] is own


def test_compiled_losses_are_known_by_their_outputs_once_they_are_built():
    mse, mae = keras.losses.MeanSquaredError(), keras.losses.MeanAbsoluteError()
    model = two_outputs({"a": mse, "b": mae})
    assert models.losses_by_path(model) is None
    target = {"a": y, "b": np.zeros((4, 2), "float32")}
    model.compute_loss(x, target, model(x))
    assert dict(models.losses_by_path(model)) == {("a",): mse, ("b",): mae}
    model = mlp(loss=mse)
    model.compute_loss(x, y, model(x))
    assert models.losses_by_path(model) == [((), mse)]
    assert models.losses_by_path(mlp(loss=None)) == []


def test_a_model_its_losses_and_metrics_are_built_without_a_batch():
    model = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    (generator,) = models.seed_generators(model.layers[0])
    before = generator.state.numpy()
    symbols = keras.KerasTensor((None, 3)), keras.KerasTensor((None, 1))
    models.build_by_symbols(model, symbols)
    assert [w.shape for w in model.weights if w.trainable] == [(3, 1), (1,)]
    assert len(models.losses_by_path(model)) == 1
    np.testing.assert_array_equal(generator.state.numpy(), before)
    built = len(model.variables), len(model.metrics_variables)
    model.train_on_batch(x, y)
    assert (len(model.variables), len(model.metrics_variables)) == built


def test_the_loss_that_fit_shows_is_a_mean_over_examples():
    model = mlp()
    models.track_loss(model, tf.constant(1.0), 3)
    models.track_loss(model, tf.constant(5.0), 1)
    assert float(model.get_metrics_result()["loss"]) == 2.0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_crossentropies_read_the_logits_that_hang_on_an_output(activation):
    logits = tf.constant([[0.5, -1.0]])
    output = keras.activations.get(activation)(logits)
    np.testing.assert_array_equal(models.logits_of(output), logits)
    assert models.logits_of(logits) is None
    name = {"softmax": "categorical_crossentropy", "sigmoid": "binary_crossentropy"}[activation]
    loss, target = keras.losses.get(name), tf.constant([[1.0, 0.0]])
    # What a loss reads is what hangs there, and not the output's own numbers.
    copy = tf.identity(output)
    models.hang_on(copy, logits=2 * logits)
    expected = loss(target, keras.activations.get(activation)(2 * logits))
    np.testing.assert_allclose(loss(target, copy), expected)


def test_losses_leave_out_what_the_mask_of_an_output_says():
    output = keras.layers.Masking()(tf.constant([[[1.0], [0.0]]]))
    mask = models.mask_of(output)
    np.testing.assert_array_equal(mask, [[True, False]])
    copy = output + 2.0
    assert models.mask_of(copy) is None
    models.hang_on(copy, mask=mask)
    assert float(keras.losses.MeanSquaredError()(tf.zeros([1, 2, 1]), copy)) == pytest.approx(9.0)


def test_fit_runs_the_train_function_that_a_model_has():
    model = mlp()
    model.make_train_function()
    calls, own = [], model.train_function
    model.train_function = lambda iterator: calls.append(iterator) or own(iterator)
    model.fit(x, y, batch_size=2, verbose=0)
    assert len(calls) == 2 and calls[0] is calls[1]
    assert model.distribute_strategy.num_replicas_in_sync == 1


# data


def incomplete():
    return ((x, None, np.ones(4, "float32")) for _ in range(2))


def test_train_step_gets_none_for_what_a_batch_has_not():
    try:
        mlp(loss=None).predict(incomplete(), steps=1, verbose=0)
    except AttributeError:
        pytest.skip("this Keras takes no generator of incomplete batches")
    seen = {}

    class Seeing(keras.Model):
        def call(self, inputs):
            return inputs

        def train_step(self, data):
            seen["step"] = data
            return {"loss": tf.constant(0.0)}

        def make_train_function(self, force=False):
            super().make_train_function(force)
            own = self.train_function

            def train_function(iterator):
                seen["spec"], seen["batch"] = iterator.element_spec, next(iterator)
                return own(data.iterator_of([seen["batch"]], seen["spec"]))

            self.train_function = train_function

    model = Seeing()
    model.compile()
    model.fit(incomplete(), steps_per_epoch=2, shuffle=False, verbose=0)
    step = keras.utils.unpack_x_y_sample_weight(seen["step"])
    assert [t is None for t in step] == [False, True, False]
    for found in (data.given(seen["batch"]), data.specs_of_given(seen["batch"])):
        assert [t is None for t in found] == [False, True, False]
    specs = data.specs_of_given(seen["spec"])
    assert specs[0].shape[1:] == (3,) and specs[1] is None
    assert data.symbols_of(specs)[0].shape[1:] == (3,)
    again = data.iterator_of([seen["batch"]], seen["spec"])
    assert again.element_spec[0].shape.as_list() == seen["spec"][0].shape.as_list()
    np.testing.assert_array_equal(next(again)[0], seen["batch"][0])


# optimizers


class Recording(optimizers.DirectedOptimizer):
    """Plain steps along twice the gradient, with what was asked on the way."""

    def __init__(self, **options):
        super().__init__(learning_rate=1.0, **options)
        self.asked = []

    def _directs(self):
        return True

    def _along(self, gradients, places):
        self.asked.append(tuple(places))
        return [2 * g for g in gradients]

    def update_step(self, gradient, variable, learning_rate):
        self._check_directed()
        self.asked.append(optimizers.place_of(self, variable))
        variable.assign_sub(gradient)


def weights():
    return [keras.Variable(np.zeros(n, "float32")) for n in (2, 3, 1)]


def test_an_update_asks_once_for_the_direction_before_its_steps():
    optimizer, variables = Recording(), weights()
    gradients = [tf.ones(2), None, tf.ones(1)]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply(gradients, variables)
    assert list(optimizer.asked) == [(0, 2), 0, 2]
    assert [float(v.numpy()[0]) for v in variables] == [-2, 0, -2]


@pytest.mark.parametrize(
    "options, expected",
    [({"loss_scale_factor": 4.0}, -0.5), ({"clipvalue": 0.25}, -0.25), ({"weight_decay": 0.5}, -2)],
    ids=str,
)
def test_a_direction_is_of_unscaled_gradients_and_is_clipped(options, expected):
    optimizer, variables = Recording(**options), weights()
    optimizer.apply([tf.ones(v.shape) for v in variables], variables)
    assert [float(v.numpy()[0]) for v in variables] == [expected] * 3


def test_a_direction_is_of_accumulated_gradients():
    optimizer, variables = Recording(gradient_accumulation_steps=2), weights()
    for scale in (1.0, 3.0):
        assert not optimizer.asked
        optimizer.apply([scale * tf.ones(v.shape) for v in variables], variables)
    assert list(optimizer.asked) == [(0, 1, 2), 0, 1, 2]
    assert [float(v.numpy()[0]) for v in variables] == [-4] * 3


def test_an_optimizer_knows_the_variables_it_was_built_for():
    optimizer, variables = keras.optimizers.SGD(), weights()
    optimizer.build(variables)
    assert [optimizers.place_of(optimizer, v) for v in variables] == [0, 1, 2]
    assert [optimizers.place_of(optimizer, v.value) for v in variables] == [0, 1, 2]


def test_a_variable_of_ones_own_class_is_saved_with_the_optimizer():
    optimizer = keras.optimizers.SGD()
    optimizer.build(weights())
    before, own = len(optimizer.variables), keras.Variable(1.0)
    optimizers.track(optimizer, own)
    assert optimizer.variables[before:] == [own]
    optimizer.own = own  # not once more
    assert len(optimizer.variables) == before + 1


def test_mixed_precision_wraps_the_optimizer_that_takes_the_steps():
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = keras.optimizers.SGD()
    model = mlp(optimizer=optimizer)
    assert model.optimizer is not optimizer
    assert optimizers.unwrapped(model.optimizer) is optimizer
    assert optimizers.unwrapped(optimizer) is optimizer


# graphs


def test_a_graph_takes_each_variable_by_one_input():
    variable, other = tf.Variable([1.0, 2.0]), tf.Variable(0.0)
    graph = graphs.new_graph("any")
    with graph.as_default():
        assert graphs.current_graph() is graph
        given = graphs.placeholder(tf.TensorSpec([None, 2]))
        total = tf.reduce_sum(given * variable) + tf.reduce_sum(variable)
        reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp"]
        (handle,) = graphs.handles_in(graph, [variable])
    assert given.shape.as_list() == [None, 2] and total.op.graph is graph
    assert len(reads) == 2 and all(op.inputs[0] is handle for op in reads)
    assert graphs.handles_in(graph, [variable])[0] is handle
    assert graphs.handles_in(graph, [other])[0] is not handle


def test_a_function_inside_of_a_graph_can_be_entered():
    @tf.function
    def inner(x):
        return tf.sin(x)

    outer = tf.function(lambda x: inner(x)).get_concrete_function(tf.TensorSpec([]))
    (call,) = (op for op in outer.graph.get_operations() if "Call" in op.type)
    graph = graphs.function_graph(call, call.get_attr("f").name)
    assert [op.type for op in graph.get_operations() if op.type == "Sin"] == ["Sin"]
    assert len(graph.inputs) == len(call.inputs) and len(graph.outputs) == len(call.outputs)


def test_an_operation_with_a_gradient_of_its_own_says_so():
    @tf.custom_gradient
    def reversed_sin(x):
        return tf.sin(x), lambda upstream: -upstream * tf.cos(x)

    with graphs.new_graph("any").as_default() as graph:
        reversed_sin(graphs.placeholder(tf.TensorSpec([])))
    own = [op for op in graph.get_operations() if graphs.has_gradient_of_its_own(op)]
    assert [op.type for op in own] == ["IdentityN"]


def test_normalization_takes_the_moments_of_tf_nn():
    original, calls = tf.nn.moments, []

    def moments(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    for layer in (keras.layers.BatchNormalization(), keras.layers.LayerNormalization()):
        layer.build((4, 3))
        calls.clear()
        with graphs.moments_exchanged(moments):
            layer(x, training=True)
        assert calls, type(layer)
    assert tf.nn.moments is original

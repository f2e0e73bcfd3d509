"""`to_rgd` and subclasses of RGD's models: what a model keeps when RGD trains it."""

import functools

import keras
import numpy as np
import pytest
import steps
from cases import BY_NAME

import keras_rgd


def functional():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    h = keras.layers.Dense(4, "tanh")(keras.layers.concatenate([inputs["a"], inputs["b"]]))
    outputs = {"p": keras.layers.Dense(1, name="p")(h), "q": keras.layers.Dense(2, name="q")(h)}
    return keras.Model(inputs, outputs, name="functional")


def test_a_functional_model_is_converted_with_its_structure_and_weights():
    model = functional()
    converted = keras_rgd.to_rgd(model)
    assert isinstance(converted, keras_rgd.RGDModel)
    assert converted.name == "functional"
    assert all(a is b for a, b in zip(model.variables, converted.variables, strict=True))
    x = {"a": np.ones((4, 3), "float32"), "b": np.ones((4, 2), "float32")}
    before = model(x)
    assert set(converted(x)) == {"p", "q"}
    np.testing.assert_array_equal(converted(x)["q"], before["q"])
    converted.compile(keras_rgd.RGD(0.1), {"p": "mse", "q": "mse"})
    converted.train_on_batch(x, {"p": np.zeros((4, 1)), "q": np.zeros((4, 2))})
    assert np.any(model(x)["q"] != before["q"])


@pytest.mark.parametrize("built", [True, False])
def test_a_sequential_model_is_converted(built):
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers] if built else layers)
    converted = keras_rgd.to_rgd(model)
    assert type(converted) is keras_rgd.RGDSequential
    converted.compile(keras_rgd.RGD(0.1), "mse")
    converted.train_on_batch(np.ones((4, 3)), np.ones((4, 1)))
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(converted(x), model(x))


def test_a_clone_is_converted():
    case = BY_NAME["dense"]
    model = steps.build(case)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    converted = keras_rgd.to_rgd(clone)
    step = steps.take(case, converted, keras_rgd.RGD(1.0))
    np.testing.assert_array_equal(
        step.direction, steps.step("dense", "layerwise", "graph").direction
    )


def test_a_model_of_keras_applications_is_converted():
    model = keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=3)
    converted = keras_rgd.to_rgd(model)
    assert converted.count_params() == model.count_params()
    x = np.ones((1, 32, 32, 3), "float32")
    np.testing.assert_array_equal(converted(x), model(x))


def test_conversion_keeps_the_inputs_dtype_and_the_policy():
    layers = [keras.layers.Embedding(5, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
    ids = keras.Input((2,), dtype="int32", name="ids")
    keras.config.set_dtype_policy("mixed_float16")
    functional, sequential = keras.Model(ids, layers[0](ids)), keras.Sequential([ids, *layers])
    keras.config.set_dtype_policy("float32")
    for model in (functional, sequential):
        converted = keras_rgd.to_rgd(model)
        assert converted.inputs[0].dtype == "int32"
        assert converted.inputs[0].name == "ids"
        assert converted.dtype_policy.name == "mixed_float16"
        converted.compile(keras_rgd.RGD(), "mse")
        assert isinstance(converted.optimizer, keras.optimizers.LossScaleOptimizer)


def test_a_subclass_of_rgd_model_may_have_layers_or_be_functional():
    class Layers(keras_rgd.RGDModel):
        def __init__(self, units, name=None):
            super().__init__(name=name)
            self.head = keras.layers.Dense(units)

        def call(self, x):
            return self.head(x)

    class Graph(keras_rgd.RGDModel):
        def __init__(self, units):
            inputs = keras.Input((5,))
            super().__init__(inputs, keras.layers.Dense(units)(inputs))

    for make in (Graph, Layers, Graph, Layers):
        model = make(3)
        model(np.ones((1, 5)))
        assert isinstance(model, keras_rgd.RGDModel)
        model.compile(keras_rgd.RGD(1.0), "mse")
        take = functools.partial(model.train_on_batch, np.ones((4, 5)), np.ones((4, 3)))
        assert np.all(steps.moved(model, take))


def test_a_model_that_rgd_trains_is_left_alone():
    model = steps.build(BY_NAME["subclassed"])
    assert keras_rgd.to_rgd(model) is model


@pytest.mark.parametrize("parent", ["Model", "Sequential"])
def test_a_model_that_may_override_something_is_told_to_take_the_mixin(parent):
    class Mine(getattr(keras, parent)):
        def call(self, x):
            return 2 * x

    with pytest.raises(ValueError, match=r"class RGDMine\(keras_rgd.RGDMixin, Mine\)"):
        keras_rgd.to_rgd(Mine())
    inputs = keras.Input((3,))

    class Weighted(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return 100 * super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match=r"class RGDWeighted\(keras_rgd.RGDMixin, Weighted\)"):
        keras_rgd.to_rgd(Weighted(inputs, keras.layers.Dense(2)(inputs)))

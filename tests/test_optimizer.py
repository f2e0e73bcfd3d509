"""RGD as a Keras optimizer: its options act on the direction as Keras's do on a gradient."""

import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME
from wide import swept

import keras_rgd
from keras_rgd._support import vectors
from keras_rgd.epsilon import Fixed, Fraction, WeakField

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5)

# Each clip is well below the norm of the directions.
OPTIONS = [
    {},
    {"learning_rate": SCHEDULE},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"clipnorm": 0.05},
    {"clipvalue": 0.01},
    {"global_clipnorm": 0.05},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    {"loss_scale_factor": 64.0},
    {"gradient_accumulation_steps": 2, "momentum": 0.9},
]


OFTEN = [OPTIONS[i] for i in (1, 3, 8, 10)]


@pytest.mark.parametrize("options", swept(OPTIONS, OFTEN), ids=lambda o: "-".join(o) or "plain")
def test_options_act_on_the_direction_as_sgds_do_on_a_gradient(options, float64):
    """Keras's SGD, handed the dense direction, goes the same way."""
    case = BY_NAME["dense"]
    options = {"learning_rate": 0.3} | options
    model, twin = steps.build(case, "float64"), steps.build(case, "float64")
    rgd, sgd = keras_rgd.RGD(epsilon=0.7, **options), keras.optimizers.SGD(**options)
    case.compile(model, rgd)
    case.compile(twin, "sgd")
    rng = np.random.default_rng(3)
    for _ in range(4):
        x, y = case.data(rng)
        dense = reference.eager(twin, x.astype("float64"), y)
        model.train_on_batch(x, y)
        direction = dense.direction(float(rgd.chosen_epsilon))
        direction = vectors.unflatten(direction, twin.trainable_variables)
        sgd.apply([sgd.scale_loss(d) for d in direction], twin.trainable_variables)
        np.testing.assert_allclose(
            reference.flatten(model.trainable_variables),
            reference.flatten(twin.trainable_variables),
            rtol=1e-8,
            atol=1e-10,
        )
    rgd.finalize_variable_values(model.trainable_variables)
    sgd.finalize_variable_values(twin.trainable_variables)
    np.testing.assert_allclose(
        reference.flatten(model.trainable_variables),
        reference.flatten(twin.trainable_variables),
        rtol=1e-8,
        atol=1e-10,
    )


def test_a_loop_of_ones_own_takes_the_step_of_fit():
    """As the README says: per-example gradients, their direction, the step."""
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    model = case.compile(steps.build(case), "sgd")
    optimizer = keras_rgd.RGD(1.0)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        gradients = keras_rgd.per_example_gradients(model, x, y)
        optimizer.apply_direction(optimizer.direction(gradients), model.trainable_variables)
        return gradients.loss

    before = reference.flatten(model.trainable_variables)
    loss = step(tf.constant(x), tf.constant(y))
    direction = before - reference.flatten(model.trainable_variables)
    expected = steps.step("dense", "double_backward", "graph")
    np.testing.assert_allclose(direction, expected.direction, rtol=1e-5, atol=1e-6)
    assert float(loss) == pytest.approx(expected.logs["loss"], rel=1e-6)


@pytest.mark.parametrize("call", ["apply", "apply_gradients"])
def test_plain_gradients_are_refused(call):
    optimizer = keras_rgd.RGD(0.1)
    weight = keras.Variable([1.0, 2.0])
    optimizer.build([weight])
    arguments = ([tf.ones(2)], [weight]) if call == "apply" else ([(tf.ones(2), weight)],)
    with pytest.raises(ValueError, match="No weight was changed"):
        getattr(optimizer, call)(*arguments)
    np.testing.assert_array_equal(weight.numpy(), [1.0, 2.0])


# state and configuration


def test_its_variables_depend_on_weights_and_configuration_alone():
    weights = [keras.Variable(np.zeros((2, 3))), keras.Variable(np.zeros(3))]
    for options, momenta in [({}, 0), ({"momentum": 0.9}, 2), ({"momentum": 0.9}, 2)]:
        counts = set()
        for way in ("auto", "layerwise", "vectorized_map", "double_backward"):
            for rule in (0.5, Fixed(1.0), WeakField(0.1), SCHEDULE):
                optimizer = keras_rgd.RGD(epsilon=rule, per_example=way, **options)
                optimizer.build(weights)
                counts.add(len(optimizer.variables))
        plain = keras.optimizers.SGD()
        plain.build(weights)
        assert counts == {len(plain.variables) + momenta + 8}


@pytest.mark.parametrize(
    "optimizer",
    [
        keras_rgd.RGD(),
        keras_rgd.RGD(SCHEDULE, SCHEDULE, 0.9, True, "double_backward", weight_decay=1e-3),
        keras_rgd.RGD(0.2, Fixed(3.0), per_example="vectorized_map", chunk_size=4, clipnorm=1.0),
        keras_rgd.RGD(0.2, Fraction(SCHEDULE), use_ema=True, name="mine"),
    ],
    ids=["defaults", "schedules", "chunks", "ema"],
)
def test_an_optimizer_survives_serialization(optimizer):
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is keras_rgd.RGD
    assert again.get_config() == optimizer.get_config()
    assert again.epsilon == optimizer.epsilon


def test_values_of_the_last_step_are_in_floatx(float64):
    optimizer = keras_rgd.RGD()
    optimizer.build([keras.Variable(np.zeros(3))])
    assert optimizer.chosen_epsilon.dtype == optimizer.lambda_max.dtype == "float64"
    assert float(optimizer.chosen_epsilon) == float(optimizer.lambda_max) == 0.0


@pytest.mark.parametrize(
    "arguments, received",
    [
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"momentum": "high"}, "momentum='high'"),
        ({"nesterov": "yes"}, "nesterov='yes'"),
        ({"epsilon": 2.0}, "epsilon=2.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": "0.5"}, "epsilon='0.5'"),
        ({"per_example": "jacobian"}, "per_example='jacobian'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": 2.0}, "chunk_size=2.0"),
    ],
)
def test_a_bad_argument_is_named(arguments, received):
    with pytest.raises(ValueError) as error:
        keras_rgd.RGD(**arguments)
    assert f"Received: {received}" in str(error.value)

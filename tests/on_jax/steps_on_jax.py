"""One training step of a case on JAX, as tests/steps.py takes it on TensorFlow.

    KERAS_BACKEND=jax python tests/on_jax/steps_on_jax.py

prints what the README's table says of JAX: "exact" or "refused" for each case, as JSON.
"""

import functools
import json
import pathlib
import sys

import dense_on_jax
import jax
import keras
import numpy as np
from keras import layers as L

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import cases

import keras_rgd

FLOAT64 = jax.config.jax_enable_x64
DTYPE = "float64" if FLOAT64 else "float32"
TOLERANCE = 1e-10 if FLOAT64 else 1e-5

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 6)).astype("float32"), RNG.integers(0, 3, 48).astype("int32")
CROSSENTROPY = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)


def use_dtype():
    """Models built from here on compute in `DTYPE`."""
    if FLOAT64:
        # Keras's operations round float64 to float32 on JAX, whatever jax_enable_x64 says.
        from keras.src.backend.common import dtypes

        dtypes.BIT64_TO_BIT32_DTYPE.update(float64="float64", int64="int64")
    keras.config.set_floatx(DTYPE)
    keras.config.set_dtype_policy(DTYPE)


def batch_of(case):
    """(x, y, sample_weight) of a case in `DTYPE`."""

    def cast(a):
        return a if a is None or a.dtype.kind != "f" else a.astype(DTYPE)

    return keras.tree.map_structure(cast, case.batch())


def built(case, optimizer):
    """The case's model, compiled and built for its batch."""
    model = case.compile(case.model(), optimizer)
    x, y, _ = batch_of(case)
    symbols = keras.tree.map_structure(lambda a: keras.KerasTensor(a.shape, str(a.dtype)), (x, y))
    model._symbolic_build(data_batch=symbols)
    return model


def flat(variables):
    """One float64 vector of variables or arrays."""
    arrays = [keras.ops.convert_to_numpy(v) for v in variables]
    return np.concatenate([a.astype(np.float64).ravel() for a in arrays])


def take(model, case):
    """What one `train_on_batch` takes off the trainable weights, (d,); its logs; its states."""
    x, y, sample_weight = batch_of(case)
    if case.class_weight is not None:
        sample_weight = None
    before = flat(model.trainable_variables)
    logs = model.train_on_batch(
        x, y, sample_weight, class_weight=case.class_weight, return_dict=True
    )
    states = [keras.ops.convert_to_numpy(v) for v in model.non_trainable_variables]
    return before - flat(model.trainable_variables), logs, states


def plain():
    return [L.Dense(5, activation="tanh")]


def classifier(optimizer, stack=plain, **options):
    keras.utils.set_random_seed(1)
    model = keras_rgd.RGDSequential([keras.Input((6,)), *stack(), L.Dense(3)])
    model.compile(optimizer, CROSSENTROPY(), **options)
    return model


def fitted(optimizer, stack=plain, epochs=2, **options):
    model = classifier(optimizer, stack, **options)
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    return model


def new_step(name, **options):
    """(direction, logs, states, optimizer, (G, v, loss)) of one step with learning rate 1."""
    case = cases.BY_NAME[name]
    optimizer = keras_rgd.RGD(1.0, **options)
    model = built(case, optimizer)
    dense = dense_on_jax.per_example(model, *batch_of(case), case.loss_shape)
    return (*take(model, case), optimizer, dense)


step = functools.cache(new_step)


def error(name, **options):
    """As `error_of`, of a case."""
    return error_of(step(name, **options))


def error_of(step):
    """How far a step is from (I - eps D) v by a dense D, relatively; and eps lambda_max."""
    direction, _, _, optimizer, (G, v, _) = step
    centred, epsilon = G - G.mean(0), float(optimizer.chosen_epsilon)
    noise = epsilon * centred.T @ (centred @ v) / len(G)
    # The step is no gradient step: the term with D is seen.
    assert np.linalg.norm(noise) > 10 * TOLERANCE * np.linalg.norm(v)
    largest = np.linalg.eigvalsh(centred @ centred.T / len(G))[-1]
    expected = v - noise
    return np.linalg.norm(direction - expected) / np.linalg.norm(expected), epsilon * largest


def main():
    """Print the table."""
    use_dtype()
    found = {}
    for case in cases.CASES:
        try:
            found[case.name] = "exact" if error(case.name)[0] <= TOLERANCE else "wrong"
        except ValueError:
            found[case.name] = "refused"
    print(json.dumps(found))


if __name__ == "__main__":
    main()

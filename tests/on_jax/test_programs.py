"""Programs in the manner of keras.io and keras_hub on JAX: their steps are those of a dense D."""

import pathlib
import sys

import dense_on_jax
import keras
import numpy as np
import pytest
from steps_on_jax import FLOAT64, flat

import keras_rgd

sys.path.append(str(pathlib.Path(__file__).parents[1] / "integration"))
from programs import PROGRAMS

pytestmark = [
    pytest.mark.skipif(FLOAT64, reason="once is enough"),
    # Of programs that ask for int64, which JAX has not, or give one input in a list.
    pytest.mark.filterwarnings("ignore:.*Explicitly requested dtype"),
    pytest.mark.filterwarnings("ignore:The structure of `inputs`"),
]

# JAX has no strings; this one's model takes them.
WITH_STRINGS = "wide_and_deep"
BY_EXAMPLES = [p for p in PROGRAMS if p.has_example_losses and p.name != WITH_STRINGS]


def first_batch(program):
    """(x, y, sample_weight) as `fit` sees them first, numpy arrays."""

    def array(t):
        # JAX has integers of 32 bits.
        return np.asarray(t, "int32" if "int" in str(t.dtype) else None)

    x, y, sample_weight = program.batches()[0]
    parts = (
        None if p is None else keras.tree.map_structure(array, p) for p in (x, y, sample_weight)
    )
    return tuple(parts)


@pytest.mark.parametrize("program", BY_EXAMPLES, ids=str)
def test_a_step_takes_the_direction_of_a_dense_D(program):
    model = program.by_examples(program.model())
    optimizer = keras_rgd.RGD(1.0)
    program.compile(model, optimizer)
    x, y, sample_weight = first_batch(program)
    model.train_on_batch(x, y, sample_weight)  # builds losses and metrics
    shape = program.loss_shape(y)
    G, v, _ = dense_on_jax.per_example(model, x, y, sample_weight, shape)
    before = flat(model.trainable_variables)
    model.train_on_batch(x, y, sample_weight)
    direction = before - flat(model.trainable_variables)
    centred, epsilon = G - G.mean(0), float(optimizer.chosen_epsilon)
    expected = v - epsilon * centred.T @ (centred @ v) / len(G)
    assert np.linalg.norm(direction - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("program", [p for p in PROGRAMS if not p.has_example_losses], ids=str)
def test_programs_without_losses_of_examples_are_refused(program):
    model = program.by_examples(program.model())
    program.compile(model, keras_rgd.RGD(0.1))
    with pytest.raises(ValueError, match="loss does not depend on the sample weights"):
        program.fit(model)

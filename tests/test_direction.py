"""One step of a few kinds of layer against the dense float64 oracle."""

import cases
import keras
import numpy as np
import pytest
import reference
import steps

import keras_rgd

TOLERANCE = {"graph": 1e-5, "xla": 1e-4}


@pytest.mark.parametrize("mode", steps.MODES)
@pytest.mark.parametrize("way", ["layerwise", "double_backward", "vectorized_map"])
def test_direction_equals_dense_D(way, mode):
    step, dense = steps.step("dense", way, mode), steps.oracle("dense", mode)
    assert step.refusal is None
    error = reference.relative_error(step.direction, dense.direction(step.epsilon))
    assert error <= TOLERANCE[mode]
    assert 0.3 <= step.epsilon * dense.lambda_max < 1


@pytest.mark.parametrize("name", ["batch_normalization", "lstm"])
def test_double_backward_is_exact_where_one_example_a_lane_is_refused(name):
    step, dense = steps.step(name, "double_backward", "graph"), steps.oracle(name)
    assert reference.relative_error(step.direction, dense.direction(step.epsilon)) <= 1e-5
    refused = steps.step(name, "vectorized_map", "graph")
    assert cases.BY_NAME[name].refusable in str(refused.refusal)
    assert not refused.direction.any()


def test_an_ordinary_model_is_refused_before_any_weight_changes():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile(keras_rgd.RGD(), "mse")
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError, match=r"keras_rgd\.to_rgd\(model\)"):
        model.fit(np.zeros((4, 5)), np.ones((4, 3)), verbose=0)
    np.testing.assert_array_equal(reference.flatten(model.trainable_variables), before)

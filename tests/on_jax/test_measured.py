"""D as it is measured on JAX, and what is made of it, against a dense D."""

import cases
import dense_on_jax
import jax
import keras
import numpy as np
import pytest
import steps_on_jax
from keras import layers as L
from steps_on_jax import DTYPE, FLOAT64, flat
from test_steps import CROSSENTROPY, X, Y, classifier

import keras_rgd
from keras_rgd import DiffusionMonitor

# Without x64 all products are float32's.
RELATIVE = 1e-10 if FLOAT64 else 2e-6
in_float32 = pytest.mark.skipif(FLOAT64, reason="once is enough")


@pytest.fixture(autouse=True, scope="module")
def _dtype():
    steps_on_jax.use_dtype()


def eigenvalues(G):
    centred = G - G.mean(0)
    return np.linalg.eigvalsh(centred @ centred.T / len(G))[::-1][: min(G.shape)]


# Whose gradients are had one by one, and whose are not: examples that mix, masks over the batch,
# masks of Dropout.
TOGETHER = {("batch_normalization", True), ("dropout", True), ("transformer", True)}
TOGETHER |= {("embedding_mask_loss", True), ("embedding_mask_loss", False)}
NAMES = ["dense", "conv2d", "lstm", "batch_normalization", "dropout", "embedding_mask_loss"]
NAMES += ["dictionaries", "regularizers", "transformer", "two_inputs_two_outputs", "add_loss"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_measured_D_is_a_dense_one(name, training):
    case = cases.BY_NAME[name]
    model = steps_on_jax.built(case, "sgd")
    batch = steps_on_jax.batch_of(case)
    before = flat(model.variables)
    D = keras_rgd.diffusion_matrix(model, *batch, training=training)
    G, v, loss = dense_on_jax.per_example(model, *batch, case.loss_shape, training)
    expected = eigenvalues(G)
    np.testing.assert_allclose(D.eigenvalues(), expected, atol=RELATIVE * expected[0])
    assert D.gradients.dtype == DTYPE
    assert float(D.gradients.loss) == pytest.approx(loss, rel=1e-5)
    u = np.random.default_rng(0).normal(size=len(v))
    ends = np.cumsum([np.prod(w.shape) for w in model.trainable_variables])[:-1]
    pairs = zip(np.split(u, ends), model.trainable_variables, strict=True)
    as_list = [np.reshape(p, w.shape).astype(DTYPE) for p, w in pairs]
    centred = G - G.mean(0)
    product = centred.T @ (centred @ u) / len(G)
    error = np.linalg.norm(flat(D.matvec(as_list)) - product)
    assert error < 1e-4 * RELATIVE / 2e-6 * np.linalg.norm(product)
    np.testing.assert_allclose(
        np.concatenate([np.reshape(r, (len(G), -1)) for r in D.gradients.rows()], 1),
        G,
        atol=RELATIVE * np.abs(G).max() * 10,
    )
    _, together = D.gradients._run("separate_gram", None, np.ones((), DTYPE))
    assert bool(together) == ((name, training) in TOGETHER)
    np.testing.assert_array_equal(flat(model.variables), before)


@pytest.mark.parametrize("name", ["dense", "lstm", "embedding_mask_loss"])
def test_chunks_change_no_D(name):
    case = cases.BY_NAME[name]
    model, batch = steps_on_jax.built(case, "sgd"), steps_on_jax.batch_of(case)
    whole = keras_rgd.diffusion_matrix(model, *batch).eigenvalues()
    for size in (1, 4):
        part = keras_rgd.diffusion_matrix(model, *batch, chunk_size=size).eigenvalues()
        np.testing.assert_allclose(part, whole, atol=RELATIVE * whole[0])


@in_float32
def test_examples_that_mix_in_evaluation_are_seen_by_the_sums_of_their_gradients():
    class Mixes(L.Layer):
        def call(self, h):
            return h - keras.ops.mean(h, 0, keepdims=True)

    model = classifier("sgd", lambda: [L.Dense(5), Mixes()])
    D = keras_rgd.diffusion_matrix(model, X, Y)
    expected = eigenvalues(dense_on_jax.per_example(model, X, Y, training=False)[0])
    np.testing.assert_allclose(D.eigenvalues()[:5], expected[:5], rtol=1e-4)


@in_float32
def test_a_second_measurement_is_of_the_weights_of_then():
    model = classifier("sgd")
    keras_rgd.diffusion_matrix(model, X, Y).eigenvalues()
    for w in model.trainable_variables:
        w.assign(1.3 * w + 0.1)
    D = keras_rgd.diffusion_matrix(model, X, Y)
    expected = eigenvalues(dense_on_jax.per_example(model, X, Y, training=False)[0])
    np.testing.assert_allclose(D.eigenvalues()[:5], expected[:5], rtol=1e-4)


@in_float32
@pytest.mark.parametrize("optimizer", ["rgd", "adam", "window"])
def test_the_monitor_records_a_dense_D_and_changes_nothing(optimizer, tmp_path):
    def made():
        options = {"rgd": {}, "window": {"window": 3}}.get(optimizer)
        return "adam" if options is None else keras_rgd.RGD(0.1, **options)

    weights = []
    for monitors in ([], [DiffusionMonitor((X, Y), log_dir=tmp_path)]):
        model = classifier(made(), lambda: [L.Dense(5), L.Dropout(0.3)])
        history = model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=monitors).history
        weights.append(flat(model.variables))
    np.testing.assert_array_equal(*weights)
    record = monitors[0].records[-1]
    expected = eigenvalues(dense_on_jax.per_example(model, X, Y, training=False)[0])
    np.testing.assert_allclose(record.eigenvalues[:5], expected[:5], rtol=1e-4)
    assert (record.per_example, record.products_dtype) == ("linearized", "float32")
    assert history["lambda_max"][-1] == pytest.approx(expected[0], rel=1e-4)
    assert (record.window_rank is None) == (optimizer != "window")
    assert (tmp_path / "diffusion").is_dir()
    monitors[0].save(tmp_path / "records.json")
    assert keras_rgd.load_records(tmp_path / "records.json")[-1].rank_gram == record.rank_gram
    keras_rgd.plot_spectrum(record)


@in_float32
@pytest.mark.parametrize("method", ["gram", "covariance", "iterative"])
def test_a_spectrum_is_that_of_a_dense_D(method):
    model = classifier("sgd")
    found = keras_rgd.spectrum(model, (X, Y), method=method, k=6, batch_size=16, verbose=False)
    expected = eigenvalues(dense_on_jax.per_example(model, X, Y, training=False)[0])
    np.testing.assert_allclose(found.eigenvalues, expected[:6], atol=2e-5 * expected[0])
    assert found.trace == pytest.approx(expected.sum(), rel=1e-4)
    assert found.per_example == "linearized"


@in_float32
def test_a_summed_loss_has_no_spectrum_in_parts():
    model = classifier("sgd")
    model.compile("sgd", CROSSENTROPY(reduction="sum"))
    with pytest.raises(ValueError, match="reduction='sum'"):
        keras_rgd.spectrum(model, (X, Y), verbose=False)


@in_float32
def test_a_loop_of_ones_own_takes_the_steps_of_fit():
    optimizer = keras_rgd.RGD(0.1)
    fitted, own = classifier(keras_rgd.RGD(0.1)), classifier(optimizer)
    fitted.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    optimizer.build(own.trainable_variables)
    for t in range(3):
        part = slice(16 * t, 16 * t + 16)
        gradients = keras_rgd.per_example_gradients(own, X[part], Y[part])
        optimizer.apply_direction(optimizer.direction(gradients), own.trainable_variables)
    np.testing.assert_allclose(
        flat(own.trainable_variables), flat(fitted.trainable_variables), atol=1e-6
    )


@in_float32
def test_losses_of_ones_own_are_measured():
    model = classifier("sgd", lambda: [L.Dense(5), L.Dropout(0.3)])
    loss = CROSSENTROPY(reduction=None)
    monitors = [
        DiffusionMonitor((X, Y), losses=lambda batch: loss(batch[1], model(batch[0]))),
        DiffusionMonitor((X, Y)),
    ]
    model.fit(X, Y, epochs=2, verbose=0, callbacks=monitors)
    one, other = (m.records[-1] for m in monitors)
    np.testing.assert_allclose(one.eigenvalues[:5], other.eigenvalues[:5], rtol=1e-4)


@in_float32
def test_what_tensorflow_alone_has_says_so():
    with pytest.raises(ImportError, match="keras_rgd.geometry needs the TensorFlow backend"):
        _ = keras_rgd.geometry
    with pytest.raises(ImportError, match="neglected_terms=True"):
        DiffusionMonitor((X, Y), neglected_terms=True)


@in_float32
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64:UserWarning")
def test_float64_without_x64_is_an_error():
    assert not jax.config.jax_enable_x64
    with pytest.raises(ValueError, match="A window of dtype float64 .*JAX_ENABLE_X64"):
        keras_rgd.RGD(0.1, window=3, window_dtype="float64")
    keras.config.set_dtype_policy("float64")
    try:
        model = classifier(keras_rgd.RGD(0.1))
        with pytest.raises(ValueError, match="Model 'rgd_sequential.*' of dtype float64"):
            keras_rgd.diffusion_matrix(model, X, Y).eigenvalues()
        with pytest.raises(ValueError, match="Model 'rgd_sequential.*' of dtype float64"):
            model.fit(X, Y, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")

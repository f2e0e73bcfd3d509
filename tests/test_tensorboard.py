"""What TensorBoard and matplotlib are shown."""

import io

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_records import record

import keras_rgd
from keras_rgd import tensorboard as tensorboard_file


@pytest.fixture
def written(tmp_path):
    """(records, what TensorBoard reads back) of three epochs, the last without a spectrum."""
    eigenvalues = 10.0 ** -np.arange(6.0)
    records = [
        record(epoch=e, eigenvalues=s * eigenvalues, lambda_max=s, rank_gram_cut=1e-9, epsilon=0.5)
        for e, s in enumerate([2.0, 1.0])
    ]
    records.append(record(epoch=2, eigenvalues=np.zeros(6), lambda_max=0.0, overlap=float("nan")))
    writer = tf.summary.create_file_writer(str(tmp_path))
    for r in records:
        tensorboard_file.write(writer, r)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    return records, events


def values(events, tag):
    return {e.step: tf.make_ndarray(e.tensor_proto) for e in events.Tensors(tag)}


def test_scalars_are_those_of_the_record_at_its_epoch(written):
    records, events = written
    for name in ("lambda_max", "trace", "rank", "epsilon", "weak_field_error_gradient"):
        received = values(events, f"diffusion/{name}")
        assert received == {r.epoch: pytest.approx(getattr(r, name)) for r in records}, name


def test_every_scalar_says_what_it_is(written):
    _, events = written
    for tag in events.Tags()["tensors"]:
        metadata = events.SummaryMetadata(tag)
        if metadata.plugin_data.plugin_name == "scalars":
            assert metadata.summary_description.endswith("."), tag


def test_what_is_not_defined_is_left_out(written):
    _, events = written
    assert set(values(events, "diffusion/overlap")) == {0, 1}


def test_the_histogram_spreads_the_spectrum_over_its_decades(written):
    _, events = written
    histograms = values(events, "diffusion/log10_eigenvalues")
    assert set(histograms) == {0, 1}
    for epoch, scale in enumerate([2.0, 1.0]):
        left, right, count = histograms[epoch].T
        assert count.sum() == 6
        assert np.count_nonzero(count) == 6  # one bucket for each decade, not one for all
        assert left[0] == pytest.approx(np.log10(scale) - 5, abs=1e-6)
        assert right[-1] == pytest.approx(np.log10(scale), abs=1e-6)


def test_the_picture_is_an_image(written):
    _, events = written
    pictures = values(events, "diffusion/spectrum")
    assert set(pictures) == {0, 1}
    width, height, png = pictures[0]
    image = matplotlib.image.imread(io.BytesIO(png))
    assert image.shape[:2] == (int(height), int(width))
    assert image[..., :3].std() > 0.01


# plot_spectrum


REFERENCE_CUT = r"cut $\lambda_{{max}}\,d\,\epsilon_{{32}}$: rank {}"
GRAM_CUT = r"cut $\lambda_{{max}}\,N\,\epsilon$: rank {}"


def spectrum(**changes):
    values = {"eigenvalues": 10.0 ** -np.arange(6.0), "lambda_max": 1.0, "rank_gram_cut": 3e-5}
    return record(**(values | {"rank": 3, "rank_cut": 5e-3, "epsilon": 0.5} | changes))


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_a_spectrum_is_drawn_on_log_axes_with_its_cut_and_1_over_eps():
    ax = keras_rgd.plot_spectrum(spectrum(epoch=4))
    assert ax.get_xscale() == ax.get_yscale() == "log"
    drawn = lines(ax)
    np.testing.assert_array_equal(drawn["epoch 4"].get_ydata(), 10.0 ** -np.arange(5.0))
    np.testing.assert_array_equal(drawn["epoch 4"].get_xdata(), np.arange(1, 6))
    assert drawn[REFERENCE_CUT.format(3)].get_ydata()[0] == 5e-3
    assert drawn[r"$1/\epsilon$"].get_ydata()[0] == 2.0


def test_where_the_references_cut_means_nothing_the_gram_matrixs_is_drawn():
    drawn = lines(keras_rgd.plot_spectrum(spectrum(rank=None, rank_gram=5)))
    assert drawn[GRAM_CUT.format(5)].get_ydata()[0] == 3e-5


def test_several_records_are_drawn_on_the_axes_given():
    ax = keras_rgd.plot_spectrum(spectrum(epoch=0))
    labels = set(lines(ax))
    again = keras_rgd.plot_spectrum([spectrum(epoch=e) for e in (1, 2, 3)], ax=ax)
    assert again is ax
    assert {"epoch 1", "epoch 3"} == {k for k in set(lines(ax)) - labels if "epoch" in k}


@pytest.mark.parametrize("records", [[], record(lambda_max=0.0, eigenvalues=np.zeros(3))])
def test_nothing_to_draw_is_refused(records):
    with pytest.raises(ValueError, match="record with a positive eigenvalue"):
        keras_rgd.plot_spectrum(records)

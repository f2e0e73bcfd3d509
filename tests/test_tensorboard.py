"""What TensorBoard is shown."""

import io

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_records import record

from keras_rgd.tensorboard import RecordWriter


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(records, what TensorBoard reads back) of three epochs, the last without a spectrum."""
    eigenvalues = 10.0 ** -np.arange(6.0)
    records = [
        record(epoch=e, eigenvalues=s * eigenvalues, lambda_max=s, rank_gram_cut=1e-9, epsilon=0.5)
        for e, s in enumerate([2.0, 1.0])
    ]
    records.append(record(epoch=2, eigenvalues=np.zeros(6), lambda_max=0.0, overlap=float("nan")))
    folder = str(tmp_path_factory.mktemp("logs"))
    writer = RecordWriter(folder)
    for r in records:
        writer.write(r)
    writer.close()
    events = EventAccumulator(folder, size_guidance={"tensors": 0})
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

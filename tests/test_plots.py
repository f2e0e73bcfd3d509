"""What matplotlib is shown."""

import numpy as np
import pytest
from test_records import record

import keras_rgd

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

"""README.md says what is so."""

import layer_table
import pytest
from cases import CASES


def test_the_layer_table_has_a_row_for_every_kind_of_model():
    assert set(layer_table.written()) == set(layer_table.rows())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_table_is_what_the_steps_do(case):
    *written, auto = layer_table.written()[case.row]
    written = dict(zip(layer_table.COLUMNS, written, strict=True))
    assert auto == ("double_backward" if case.opaque else "layerwise")
    for column in layer_table.COLUMNS:
        assert layer_table.cell(case, column) in written[column].split(" or "), column

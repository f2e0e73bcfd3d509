"""README.md says what is so."""

import layer_table
import pytest
from cases import BY_NAME
from wide import ALWAYS, STEPS, swept


def test_the_layer_table_has_a_row_for_every_kind_of_model():
    assert set(layer_table.written()) == set(layer_table.rows())


@pytest.mark.parametrize("name, way", swept(STEPS, ALWAYS))
def test_the_layer_table_is_what_the_steps_do(name, way):
    case = BY_NAME[name]
    *written, auto, _ = layer_table.written()[case.row]
    written = dict(zip(layer_table.COLUMNS, written, strict=True))
    assert auto == ("double_backward" if case.opaque else "layerwise")
    assert layer_table.cell(case, way) in written[way].split(" or ")

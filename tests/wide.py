"""Sweeps over many layers, losses or sizes: a few of their members run always, all in a second run.

`python -m pytest` runs the few, one of each kind; `python -m pytest -m wide` runs the others.
"""

import pytest

wide = pytest.mark.wide


def swept(values, always):
    """Values for `pytest.mark.parametrize`, of which all but those in `always` are wide.

    Args:
        values: the members of the sweep.
        always: those that run always, or their names.
    """
    left = [a for a in always if a not in values and a not in map(str, values)]
    assert not left, f"not among the members of the sweep: {left}"
    return [v if v in always or str(v) in always else _param(v) for v in values]


def _param(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=wide)

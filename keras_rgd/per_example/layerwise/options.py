"""What "layerwise" is told about the step that it serves."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerwiseOptions:
    """How "layerwise" works for one model.

    Attributes:
        n: N, to count work by where it is not known when the step is traced.
        compiled: whether the caller compiles what it traces with XLA.
        repeats: how many operations repeat a weight for each example, as a class token: the number
            that `check_layerwise` found, so that another length of batch that finds another is
            refused; `True` for as many as look so, `False` for none.
        precise: whether to work in float64, so that the Gram matrix keeps the digits that
            centring loses, and to form it whatever it costs, from one weight after another, as
            memory is short then.
    """

    n: int = 64
    compiled: bool = False
    repeats: bool | int = True
    precise: bool = False

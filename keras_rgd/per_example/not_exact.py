"""The refusal of a way that would not give a model's per-example gradients."""

from keras_rgd.per_example.layer_calls import class_name


class NotExactError(ValueError):
    """A way would not give this model's per-example gradients.

    Args:
        reason: why.
        advice: what to write instead.
    """

    def __init__(self, reason, advice):
        super().__init__(f"{reason} {advice}")
        self.reason = reason


def layer_mixes(spot):
    """A sentence on a layer whose examples mix, from a `mixing.Spot`."""
    gives = "gives" if spot.known else "may give"
    return (
        f"Layer {spot.owner} {gives} an example an output that depends on the other examples of "
        f"the batch (by {spot.operation})."
    )


def loss_mixes(model, mixing):
    """A sentence on a loss by which examples mix, from a `Mixing`."""
    if mixing.loss is not None:
        depends = "depends" if mixing.loss.known else "may depend"
        return (
            f"The loss of one example {depends} on the outputs of other examples (by "
            f"{mixing.loss.operation}): loss={model.loss}."
        )
    return (
        f"The loss reaches {mixing.beside} by another way than the model's output: "
        f"loss={model.loss}."
    )


def gradient_differs(model, weight, advice):
    """The error of a batch's gradient that is not the mean of those by examples.

    Args:
        model: the model.
        weight: the path of a weight where they differ.
        advice: what to write instead.
    """
    return NotExactError(
        f"`{class_name(model)}` has a loss that does not reach the weights through the model's "
        "output alone (a `compute_loss` of its own?): the mean of the per-example gradients of "
        f"{weight} is not the batch's gradient.",
        advice,
    )


def reason(error):
    """The line of TensorFlow's long error message that says what happened, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ValueError: ")]
    return (told or lines or [type(error).__name__])[-1].removeprefix("ValueError: ")[:200]

"""The operations: everything that a session can be asked, each declared once (`attribution.operation`)."""

from attribution.operation import Operation
from attribution.operations import (
    ablations,
    circuits,
    compare,
    features,
    getters,
    gradients,
    interventions,
    lens,
    patching,
    samples,
    scores,
    steering,
    together,
)

OPERATIONS: dict[str, Operation] = {
    value.name: value
    for module in (
        samples,
        getters,
        gradients,
        scores,
        ablations,
        patching,
        steering,
        interventions,
        lens,
        together,
        features,
        compare,
        circuits,
    )
    for value in vars(module).values()
    if isinstance(value, Operation)
}

"""Attribution patching: the change of an objective when components write something else, to first order.

⟨∂O/∂a, a − ā⟩ summed over positions, with a what a component wrote, ā what would take its place, and the gradient that
of the whole model (Nanda 2023, "Attribution patching"). With ā = 0 it is gradient × activation.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.means import Means
from attribution.model.whole_gradient import Passed


def product_with(
    passed: Passed, grads: Passed, means: Means | None, dtype: torch.dtype, *, absolute: bool = False
) -> Float[Tensor, "layer column"]:
    """⟨gradient, activation − mean⟩ of each head, and of the MLP in the last column, summed over positions.

    Args:
        means: None is 0.
        absolute: sum the absolute values of the positions.
    """
    heads, mlps = passed.z.to(dtype), passed.mlp_out.to(dtype)
    if means is not None:
        heads, mlps = heads - means.z, mlps - means.mlp_out
    of_heads, of_mlps = (heads * grads.z).sum(-1), (mlps * grads.mlp_out).sum(-1)
    scores = torch.cat([of_heads, of_mlps[..., None]], dim=-1)
    return (scores.abs() if absolute else scores).sum(1)

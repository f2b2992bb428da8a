"""Where results go."""

from torch import Tensor

from attribution.errors import InvalidArgument


def on_device(tensor: Tensor, device: str) -> Tensor:
    """`tensor` on the device of this name.

    Raises:
        InvalidArgument: there is no such device here.
    """
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError) as error:  # torch says it in either way
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"device {device!r} cannot be used: {reason}", param="device") from error

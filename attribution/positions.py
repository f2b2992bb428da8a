"""Position windows: which token positions of a sequence are kept.

    "all" | "prompt" | "generated" | "last" | {"start", "stop", "step"}

`last` is the last token of the prompt. A sequence of P prompt tokens and N generated ones has P + N − 1 fed positions
(the last generated token is never fed), and a window keeps the fed positions that it names.
"""

from dataclasses import dataclass

from attribution.errors import BadPositions

NAMED = ("all", "prompt", "generated", "last")
_KEYS = {"start", "stop", "step"}


@dataclass(frozen=True)
class Window:
    """A set of token positions, in ascending order. `name` is one of `NAMED`, or None for an explicit range."""

    name: str | None
    start: int = 0
    stop: int | None = None
    step: int = 1

    def span(self, prompt: int, tokens: int) -> range:
        """The positions kept of a sequence of `tokens` fed positions, `prompt` of which are the prompt."""
        bounds = {
            "all": (0, tokens),
            "prompt": (0, prompt),
            "generated": (prompt, tokens),
            "last": (prompt - 1, prompt),
            None: (self.start, tokens if self.stop is None else self.stop),
        }
        start, stop = bounds[self.name]
        return range(start, max(start, min(stop, tokens)), self.step)


def parse_window(value: object) -> Window:
    """Parse the `positions` of a savepoint; None means all.

    Raises:
        BadPositions: naming what was found and what is allowed.
    """
    if value is None:
        return Window("all")
    if isinstance(value, str) and value in NAMED:
        return Window(value)
    if not isinstance(value, dict) or not value or not set(value) <= _KEYS:
        raise BadPositions(
            f'positions is one of {", ".join(NAMED)} or {{"start", "stop", "step"}}; found {value!r}',
            param="positions",
        )
    given = {"start": 0, "stop": None, "step": 1} | {k: v for k, v in value.items() if v is not None}
    start, stop, step = given["start"], given["stop"], given["step"]
    for name, number, least in (("start", start, 0), ("stop", stop, 1), ("step", step, 1)):
        if name == "stop" and number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise BadPositions(
                f"positions.{name} is an integer of at least {least}; found {number!r}", param="positions"
            )
    if stop is not None and stop <= start:
        raise BadPositions(f"positions.stop ({stop}) must be above positions.start ({start})", param="positions")
    return Window(None, start, stop, step)


def overlap(window: range, start: int, stop: int) -> range:
    """The positions of `window` that lie in [start, stop), in order."""
    first = window.start
    if first < start:
        first += -(-(start - first) // window.step) * window.step
    return range(first, max(first, min(window.stop, stop)), window.step)

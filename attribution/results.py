"""Results of a task, such as `puzzles.Result`, and the samples that their prompts become."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attribution.errors import InvalidArgument


@dataclass(frozen=True)
class SampleRef:
    """Where the activations of a result's prompt are stored."""

    dataset_id: str
    sample_id: int | str


def forward_results(
    session: Any, dataset_id: str, results: Sequence[Any], prompt_attr: str = "prompt", show_progress: bool = True
) -> Any:
    """`batch_forward` over the prompts of `results`, each a sample named by its `index`.

    Args:
        session: a `LocalSession` or `ModelClient`, of which this is a method.
        results: each has `index` and a prompt; its `outputs` becomes the `SampleRef` of its sample.
        prompt_attr: the attribute with the prompt: templated text, to which no special tokens are added.

    Returns:
        What `batch_forward` returns.

    Raises:
        InvalidArgument: a result lacks an attribute, or two have one index; nothing is run then.
    """
    arguments = batch_arguments(dataset_id, results, prompt_attr, show_progress)
    forwarded = session.batch_forward(**arguments)
    refer(dataset_id, results)
    return forwarded


def batch_arguments(dataset_id: str, results: Sequence[Any], prompt_attr: str, show_progress: bool) -> dict[str, Any]:
    """The arguments of `batch_forward` for `forward_results`, which raises as this does."""
    indices = [_attribute(result, "index", "results") for result in results]
    index, count = Counter(indices).most_common(1)[0] if indices else (None, 0)
    if count > 1:
        raise InvalidArgument(f"{count} results have the index {index!r}; each is a sample of its own", param="results")
    return {
        "dataset_id": dataset_id,
        "prompts": [_attribute(result, prompt_attr, "prompt_attr") for result in results],
        "sample_ids": indices,
        "add_special_tokens": False,
        "show_progress": show_progress,
    }


def refer(dataset_id: str, results: Iterable[Any]) -> None:
    """Tell each result where its activations are."""
    for result in results:
        result.outputs = SampleRef(dataset_id, result.index)


def _attribute(result: Any, name: str, param: str) -> Any:
    if not hasattr(result, name):
        raise InvalidArgument(f"a {type(result).__name__} among the results has no attribute {name!r}", param=param)
    return getattr(result, name)

"""Results on disk: their prompts and answers as JSON; the activations stay in the session's store."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from attribution.errors import InvalidArgument
from attribution.json_files import read_json, write_json
from attribution.results import SampleRef
from puzzles import Result

_RESULTS = TypeAdapter(list[Result])


def save_results(results: Iterable[Result], path: Path | str) -> Path:
    """Write results as JSON, with where their activations are stored.

    Raises:
        StorageFailed: the file cannot be written.
    """
    return write_json(path, "results", {"results": [asdict(result) for result in results]})


def load_results(path: Path | str) -> list[Result]:
    """The results of a file; with outputs if they had them, which a session of that store or server still finds.

    Raises:
        StorageFailed: the file cannot be read.
        InvalidArgument: it holds no results.
    """
    record = read_json(path, "results")
    try:
        results = _RESULTS.validate_python(record.get("results"))
        for result in results:
            if result.outputs is not None:
                result.outputs = SampleRef(**result.outputs)
    except (ValidationError, TypeError) as error:
        raise InvalidArgument(f"{path} is a damaged file of results: {error}", param="path") from error
    return results

"""Every error that Sightline raises on purpose.

    SightlineError                      500 internal_error
    ├── InvalidRequest                  400 invalid_request
    │   ├── UnsupportedParameter        400 unsupported_parameter
    │   ├── BadSelector                 400 bad_selector
    │   ├── BadPositions                400 bad_positions
    │   ├── ContextLengthExceeded       400 context_length_exceeded
    │   ├── CaptureTooLarge             400 capture_too_large
    │   └── BadEnvelope                 400 bad_envelope
    │       └── EnvelopeTooLarge        413 envelope_too_large
    ├── InvalidArgument                 422 invalid_argument
    │   ├── OutOfRange                  422 out_of_range
    │   ├── ShapeMismatch               422 shape_mismatch
    │   ├── NoKeyLeft                   422 no_key_left
    │   ├── ModelAmbiguous              422 model_ambiguous
    │   ├── UnsupportedModel            422 unsupported_model
    │   └── GradientsRefused            422 gradients_refused
    ├── Unauthorized                    401 invalid_api_key
    ├── NotFound                        404 not_found
    │   ├── ModelNotFound               404 model_not_found
    │   ├── RunNotFound                 404 run_not_found
    │   ├── DatasetNotFound             404 dataset_not_found
    │   ├── SampleNotFound              404 sample_not_found
    │   ├── VectorNotFound              404 vector_not_found
    │   └── SourceNotFound              404 source_not_found
    ├── Busy                            409 busy
    ├── SampleMismatch                  409 sample_mismatch
    ├── VectorMismatch                  409 vector_mismatch
    ├── SourceMismatch                  409 source_mismatch
    ├── ModelLoadFailed                 422 model_load_failed
    ├── QueueFull                       429 queue_full
    ├── Cancelled                       499 cancelled
    ├── NotFinite                       500 not_finite
    ├── LibraryMissing                  501 library_missing
    ├── ShuttingDown                    503 shutting_down
    ├── ServerUnreachable               503 server_unreachable (raised by clients)
    ├── OutOfMemory                     503 out_of_memory
    └── StorageFailed                   507 storage_failed
        └── CannotFit                   507 cannot_fit

A message says what was wrong, what was found and what to do. Errors cross the wire as
``{"error": {"message", "type", "param", "code"}}``.
"""

from typing import ClassVar


class SightlineError(Exception):
    """Root of the tree: `status` is the HTTP status, `code` the machine's name, `param` the argument at fault."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init_subclass__(cls, status: int | None = None, code: str | None = None, type: str | None = None) -> None:  # noqa: A002
        """What differs from the parent is named in the head of a class."""
        for name, value in {"status": status, "code": code, "type": type}.items():
            if value is not None:
                setattr(cls, name, value)

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of this error, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(SightlineError, status=400, code="invalid_request", type="invalid_request_error"):
    """The request cannot be served as it was written."""


class UnsupportedParameter(InvalidRequest, code="unsupported_parameter"):
    """A field that OpenAI knows and Sightline does not serve."""


class BadSelector(InvalidRequest, code="bad_selector"):
    """A selector that does not parse, or names nothing in the model."""


class BadPositions(InvalidRequest, code="bad_positions"):
    """A position window that does not parse, or selects no token."""


class ContextLengthExceeded(InvalidRequest, code="context_length_exceeded"):
    """The prompt and the tokens asked for do not fit the model's window."""


class CaptureTooLarge(InvalidRequest, code="capture_too_large"):
    """The savepoints of one request would keep more bytes than the server allows."""


class BadEnvelope(InvalidRequest, code="bad_envelope"):
    """A body of tensors that is not what its header says, or no such body at all."""


class EnvelopeTooLarge(BadEnvelope, status=413, code="envelope_too_large"):
    """A body of tensors whose header announces more bytes than are taken; nothing of it was read."""


class InvalidArgument(SightlineError, status=422, code="invalid_argument", type="invalid_request_error"):
    """An argument of an operation has a value that it cannot have; `param` names it."""


class OutOfRange(InvalidArgument, code="out_of_range"):
    """A layer, head, position or token that the model or the sample does not have."""


class ShapeMismatch(InvalidArgument, code="shape_mismatch"):
    """A tensor whose shape does not fit the other arguments."""


class NoKeyLeft(InvalidArgument, code="no_key_left"):
    """Every edge of a query would be removed, and its attention would be 0/0."""


class ModelAmbiguous(InvalidArgument, code="model_ambiguous"):
    """Several models are loaded and none was named."""


class UnsupportedModel(InvalidArgument, code="unsupported_model"):
    """The points of this model are not known, so that nothing can be attributed to its parts."""


class GradientsRefused(InvalidArgument, code="gradients_refused"):
    """Gradients through this model were proved wrong when it was loaded."""


class Unauthorized(SightlineError, status=401, code="invalid_api_key", type="authentication_error"):
    """The API key is missing or wrong."""


class NotFound(SightlineError, status=404, code="not_found", type="not_found_error"):
    """The thing that was named does not exist."""


class ModelNotFound(NotFound, code="model_not_found"):
    """No loaded model has this name; another one is never taken in its place."""


class RunNotFound(NotFound, code="run_not_found"):
    """No recorded run has this id, or the run has no such file."""


class DatasetNotFound(NotFound, code="dataset_not_found"):
    """No sample was stored under this dataset."""


class SampleNotFound(NotFound, code="sample_not_found"):
    """The dataset has no such sample."""


class VectorNotFound(NotFound, code="vector_not_found"):
    """No steering vector has this name."""


class SourceNotFound(NotFound, code="source_not_found"):
    """No autoencoder of this name, or at this layer, is loaded for the model."""


class Busy(SightlineError, status=409, code="busy", type="conflict_error"):
    """The thing that was named is in use and cannot be changed now."""


class SampleMismatch(SightlineError, status=409, code="sample_mismatch", type="conflict_error"):
    """What is stored was computed by another model or from another prompt; it is never mixed nor overwritten."""


class VectorMismatch(SightlineError, status=409, code="vector_mismatch", type="conflict_error"):
    """A steering vector was computed with another model, or at a place of another width; it is never used there."""


class SourceMismatch(SightlineError, status=409, code="source_mismatch", type="conflict_error"):
    """An autoencoder is of another model, or its place or width is not the model's; it is never used there."""


class ModelLoadFailed(SightlineError, status=422, code="model_load_failed", type="invalid_request_error"):
    """A model could not be loaded; the message carries the library's reason."""


class QueueFull(SightlineError, status=429, code="queue_full", type="rate_limit_error"):
    """The waiting line of this model is full; try again after `retry_after` seconds."""

    retry_after: ClassVar[int] = 2


class Cancelled(SightlineError, status=499, code="cancelled", type="cancelled_error"):
    """The work was dropped because its client went away."""


class NotFinite(SightlineError, code="not_finite"):
    """The model computed NaN where a token was to be chosen: nothing that follows would mean anything."""


class LibraryMissing(SightlineError, status=501, code="library_missing"):
    """What was asked for needs a library that is not installed; the message names the extra that brings it."""


class ShuttingDown(SightlineError, status=503, code="shutting_down"):
    """The server or this model is stopping and takes no new work."""


class ServerUnreachable(SightlineError, status=503, code="server_unreachable"):
    """Raised by a client: no server answers at its URL, or the connection broke off."""


class OutOfMemory(SightlineError, status=503, code="out_of_memory"):
    """The device has no memory for this piece of work; what was under way was dropped, and the server goes on."""


class StorageFailed(SightlineError, status=507, code="storage_failed"):
    """A file could not be written or read; nothing was left half-written."""


class CannotFit(StorageFailed, code="cannot_fit"):
    """What was asked for takes more room than there is; nothing was begun."""

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
    │   └── VectorNotFound              404 vector_not_found
    ├── Busy                            409 busy
    ├── SampleMismatch                  409 sample_mismatch
    ├── VectorMismatch                  409 vector_mismatch
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

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of this error, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(SightlineError):
    """The request cannot be served as it was written."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A field that OpenAI knows and Sightline does not serve."""

    code = "unsupported_parameter"


class BadSelector(InvalidRequest):
    """A selector that does not parse, or names nothing in the model."""

    code = "bad_selector"


class BadPositions(InvalidRequest):
    """A position window that does not parse, or selects no token."""

    code = "bad_positions"


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for do not fit the model's window."""

    code = "context_length_exceeded"


class CaptureTooLarge(InvalidRequest):
    """The savepoints of one request would keep more bytes than the server allows."""

    code = "capture_too_large"


class BadEnvelope(InvalidRequest):
    """A body of tensors that is not what its header says, or no such body at all."""

    code = "bad_envelope"


class EnvelopeTooLarge(BadEnvelope):
    """A body of tensors whose header announces more bytes than are taken; nothing of it was read."""

    status = 413
    code = "envelope_too_large"


class InvalidArgument(SightlineError):
    """An argument of an operation has a value that it cannot have; `param` names it."""

    status = 422
    code = "invalid_argument"
    type = "invalid_request_error"


class OutOfRange(InvalidArgument):
    """A layer, head, position or token that the model or the sample does not have."""

    code = "out_of_range"


class ShapeMismatch(InvalidArgument):
    """A tensor whose shape does not fit the other arguments."""

    code = "shape_mismatch"


class NoKeyLeft(InvalidArgument):
    """Every edge of a query would be removed, and its attention would be 0/0."""

    code = "no_key_left"


class ModelAmbiguous(InvalidArgument):
    """Several models are loaded and none was named."""

    code = "model_ambiguous"


class UnsupportedModel(InvalidArgument):
    """The points of this model are not known, so that nothing can be attributed to its parts."""

    code = "unsupported_model"


class GradientsRefused(InvalidArgument):
    """Gradients through this model were proved wrong when it was loaded."""

    code = "gradients_refused"


class Unauthorized(SightlineError):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class NotFound(SightlineError):
    """The thing that was named does not exist."""

    status = 404
    code = "not_found"
    type = "not_found_error"


class ModelNotFound(NotFound):
    """No loaded model has this name; another one is never taken in its place."""

    code = "model_not_found"


class RunNotFound(NotFound):
    """No recorded run has this id, or the run has no such file."""

    code = "run_not_found"


class DatasetNotFound(NotFound):
    """No sample was stored under this dataset."""

    code = "dataset_not_found"


class SampleNotFound(NotFound):
    """The dataset has no such sample."""

    code = "sample_not_found"


class VectorNotFound(NotFound):
    """No steering vector has this name."""

    code = "vector_not_found"


class Busy(SightlineError):
    """The thing that was named is in use and cannot be changed now."""

    status = 409
    code = "busy"
    type = "conflict_error"


class SampleMismatch(SightlineError):
    """What is stored was computed by another model or from another prompt; it is never mixed nor overwritten."""

    status = 409
    code = "sample_mismatch"
    type = "conflict_error"


class VectorMismatch(SightlineError):
    """A steering vector was computed with another model, or at a place of another width; it is never used there."""

    status = 409
    code = "vector_mismatch"
    type = "conflict_error"


class ModelLoadFailed(SightlineError):
    """A model could not be loaded; the message carries the library's reason."""

    status = 422
    code = "model_load_failed"
    type = "invalid_request_error"


class QueueFull(SightlineError):
    """The waiting line of this model is full; try again after `retry_after` seconds."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"
    retry_after: ClassVar[int] = 2


class Cancelled(SightlineError):
    """The work was dropped because its client went away."""

    status = 499
    code = "cancelled"
    type = "cancelled_error"


class NotFinite(SightlineError):
    """The model computed NaN where a token was to be chosen: nothing that follows would mean anything."""

    code = "not_finite"


class LibraryMissing(SightlineError):
    """What was asked for needs a library that is not installed; the message names the extra that brings it."""

    status = 501
    code = "library_missing"


class ShuttingDown(SightlineError):
    """The server or this model is stopping and takes no new work."""

    status = 503
    code = "shutting_down"


class ServerUnreachable(SightlineError):
    """Raised by a client: no server answers at its URL, or the connection broke off."""

    code = "server_unreachable"
    status = 503


class OutOfMemory(SightlineError):
    """The device has no memory for this piece of work; what was under way was dropped, and the server goes on."""

    status = 503
    code = "out_of_memory"


class StorageFailed(SightlineError):
    """A file could not be written or read; nothing was left half-written."""

    status = 507
    code = "storage_failed"


class CannotFit(StorageFailed):
    """What was asked for takes more room than there is; nothing was begun."""

    code = "cannot_fit"

"""The bodies of the OpenAI routes. What OpenAI knows and Sightline does not serve is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from attribution.errors import InvalidRequest, UnsupportedParameter
from server.generation.sampling import SamplingParams
from server.intervention_body import InterventionBody, Strict, one_of
from server.savepoints import SavepointSpec

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_INTERVENTIONS = 64

# what a client may send with these values changes nothing; with another value the field is refused
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "best_of": (1,),
    "parallel_tool_calls": (True,),
}
_UNSUPPORTED = (
    "audio function_call functions moderation prediction prompt_cache_key prompt_cache_options "
    "prompt_cache_retention reasoning_effort safety_identifier suffix verbosity web_search_options"
).split()

# what a reply has beside OpenAI's fields, and null or empty ones: clients send an answer back as they got it
_OF_A_REPLY = frozenset(
    {"run_id", "session_id", "activation_files", "activations_meta", "annotations", "interventions"}
)

_Text = Annotated[str, Field(max_length=4_000_000)]


class SavepointBody(Strict):
    """A savepoint of a request."""

    name: str
    selector: str
    positions: Any = None
    dtype: str | None = None

    def spec(self) -> SavepointSpec:
        """The same as a plain value."""
        return SavepointSpec(self.name, self.selector, self.positions, self.dtype)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(Strict):
    """What chat and completions have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Annotated[
        str | Annotated[list[str], Field(max_length=16)] | None,
        one_of("stop", "a string or up to 16 of them"),
    ] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    ignore_eos: bool = False
    store_activations: bool | None = None
    savepoints: Annotated[list[SavepointBody], Field(max_length=64)] | None = None
    interventions: Annotated[list[InterventionBody], Field(max_length=MAX_INTERVENTIONS)] | None = None
    baseline: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name, values in _HARMLESS.items():
            if name in data and (data[name] is None or data[name] in values):
                del data[name]
        for name in (*_HARMLESS, *_UNSUPPORTED):
            if name in data and name not in cls.model_fields and data.pop(name) is not None:
                allowed = f" other than {_HARMLESS[name][0]!r}" if name in _HARMLESS else ""
                raise UnsupportedParameter(f"{name!r}{allowed} is not supported; leave it out", param=name)
        # the SDK sends null for what is not set
        return {name: value for name, value in data.items() if value is not None or name == "prompt"}

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        return self

    @field_validator("stop")
    @classmethod
    def _stop_is_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and (value == "" or "" in value if isinstance(value, list) else value == ""):
            raise InvalidRequest("a stop string cannot be empty", param="stop")
        return value

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> SamplingParams:
        """How to choose tokens."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
        )


class TextPart(Strict):
    """A text part of a message; images and audio are refused."""

    type: Literal["text"]
    text: _Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind not in (None, "text"):
            raise UnsupportedParameter(
                f"content parts of type {kind!r} are not supported; send parts of type 'text'",
                param="messages",
            )
        return data


class ChatMessage(BaseModel):
    """One message. Fields of assistant and tool messages go to the chat template as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        _Text | list[TextPart] | None,
        one_of("messages", "a list whose 'content' is text or a list of text parts"),
    ] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_a_reply_adds(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("role") != "assistant":
            return data
        return {k: v for k, v in data.items() if v is not None and k not in _OF_A_REPLY}

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise InvalidRequest(f"the {self.role} message has no content", param="messages")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: text parts joined, OpenAI's `developer` as `system`."""
        data = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            data["content"] = "".join(part.text for part in self.content)
        data.setdefault("content", "")
        return data | {"role": "system" if self.role == "developer" else self.role}


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed with logprobs: true", param="top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[
        _Text | list[int] | list[_Text] | list[list[int]],
        one_of("prompt", "a string, token ids, or a list of either"),
    ]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class LoadBody(Strict):
    """`POST /models/load`."""

    model_id: str = Field(min_length=1, max_length=500)
    device_map: str | dict[str, int | str] = "auto"
    dtype: str = "auto"
    revision: str | None = None
    attn_implementation: str | None = None
    quantization: Literal["gptq", "nf4", "int8"] | None = None
    savepoints: Annotated[list[SavepointBody], Field(max_length=64)] = Field(default_factory=list)


class UnloadBody(Strict):
    """`POST /models/unload`."""

    model_id: str

"""What the routes of one app share."""

import time
from dataclasses import dataclass, field

from fastapi import Request

from server.answers import Answer
from server.bodies import TensorRoom
from server.metrics import Metrics
from server.registry import ModelRegistry
from server.runs import RunStore
from server.settings import Settings

SERVER_FAILED = "the server failed on this request; its log has the reason"


@dataclass(frozen=True)
class State:
    """The collaborators of one app. Nothing of it is global: two apps in one process share nothing."""

    settings: Settings
    metrics: Metrics
    registry: ModelRegistry
    runs: RunStore
    room: TensorRoom
    started: float = field(default_factory=time.time)

    def count(self, answer: Answer, written: int) -> None:
        """Put a finished answer into the metrics."""
        name = answer.loaded.id
        self.metrics.prompt_tokens_total.labels(name).inc(sum(len(prompt) for prompt in answer.plan.prompts))
        self.metrics.completion_tokens_total.labels(name).inc(sum(len(s.tokens) for s in answer.sequences))
        self.metrics.capture_bytes_total.labels(name).inc(written)
        for sequence in answer.sequences:
            if sequence.first_token is not None:
                delay = sequence.first_token - sequence.created
                self.metrics.time_to_first_token_seconds.labels(name).observe(delay)


def state_of(request: Request) -> State:
    """The state of the app that serves this request."""
    return request.app.state.sightline

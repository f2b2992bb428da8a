"""Logging: the standard module, one line a record, each with the id of the request it belongs to.

``log.info("loaded", extra={"model": "demo", "seconds": 1.2})`` is written as text
(``12:00:01 INFO    server.registry: loaded model=demo seconds=1.2``) or as one JSON object a line.
"""

import json
import logging
import logging.handlers
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from server.settings import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request being served in this context; empty outside one."""

_OURS = ("sightline", "puzzles", "attribution", "server", "clients")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, extra fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identifier := _request_id(record):
            fields["request_id"] = identifier
        for name, value in _extra(record).items():
            fields[f"extra_{name}" if name in fields else name] = value
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line to read: time, level, logger, message, extra fields as ``name=value``, the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, with the traceback below it if there is one."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        parts = [f"{clock} {record.levelname:<7} {record.name}: {record.getMessage()}"]
        parts += [f"{name}={value}" for name, value in _extra(record).items()]
        if identifier := _request_id(record):
            parts.append(f"[{identifier}]")
        # What a client sent may stand in a message: it must not start a line that looks like another record.
        line = " ".join(parts).replace("\r", "\\r").replace("\n", "\\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(settings: Settings) -> None:
    """Send the log of this process to stderr, and to `settings.log_file` too if there is one.

    Called again, it replaces what it set up before and leaves the handlers of others alone. Libraries are
    heard from `warning` on, whatever the level. The file is opened anew when it is rotated away.

    Raises:
        OSError: the log file cannot be opened.
    """
    handlers: list[logging.Handler] = [
        _marked(logging.StreamHandler(sys.stderr), settings, terminal=sys.stderr.isatty())
    ]
    if settings.log_file is not None:
        to_file = logging.handlers.WatchedFileHandler(settings.log_file, encoding="utf-8")
        handlers.append(_marked(to_file, settings, terminal=False))
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "sightline", False):
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


def _marked(handler: logging.Handler, settings: Settings, *, terminal: bool) -> logging.Handler:
    """`handler` with the formatter that fits where it writes, marked as ours."""
    wanted = settings.log_format
    if wanted == "auto":
        wanted = "text" if terminal else "json"
    handler.setFormatter(JsonFormatter() if wanted == "json" else TextFormatter())
    handler.__dict__["sightline"] = True
    return handler


def _request_id(record: logging.LogRecord) -> str:
    return str(record.__dict__.get("request_id") or request_id.get())


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}

"""Log set-up of a process: one event a line, `key=value` on a terminal, JSON elsewhere."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

from splitserve.config import LogSettings

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`12:01:02.345 info prefill-0 splitserve.bus: bus up connection=beats`."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._name = process_name

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower()} {self._name} {record.name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `time` is Unix seconds."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._name = process_name

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._name,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def set_up_logs(settings: LogSettings, process_name: str, stream: TextIO | None = None) -> None:
    """Send `splitserve.*` and warnings of the libraries to `stream` (default: standard error)."""
    out = stream or sys.stderr
    text = settings.log_format == "text" or (settings.log_format == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(TextFormatter(process_name) if text else JsonFormatter(process_name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("splitserve").setLevel(settings.log_level.upper())

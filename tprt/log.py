"""Logging for every process of a deployment: one line per record on standard error, as text or JSON.

Standard output belongs to results. Knows nothing of the configuration object: the edge passes plain values.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

LogFormat = Literal["text", "json"]


class _JsonFormatter(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time_s": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            entry.update(fields)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(level: str, log_format: LogFormat, process_name: str) -> None:
    """Send this process's records of `level` and above to standard error, marked with `process_name`."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter(process_name))
    else:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname).1s [{process_name}] %(message)s", "%H:%M:%S")
        )
    root = logging.getLogger("tprt")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def tell(text: str, level: int = logging.INFO) -> None:
    """Tell whoever has started the program, whatever level is logged; in a JSON log by a record like others."""
    handlers = logging.getLogger("tprt").handlers
    if any(isinstance(handler.formatter, _JsonFormatter) for handler in handlers):
        record = logging.LogRecord("tprt", level, __file__, 0, text, None, None)
        for handler in handlers:
            handler.handle(record)
    else:
        print(f"tprt: {text}", file=sys.stderr, flush=True)


def get_logger(name: str) -> logging.Logger:
    """Return the logger for module `name`; all of them hang under `tprt`."""
    return logging.getLogger(name if name.startswith("tprt") else f"tprt.{name}")

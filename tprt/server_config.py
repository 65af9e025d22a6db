"""The settings of the HTTP server: the section `server`.

Knows nothing of YAML, the command line or the environment.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from tprt.config_section import PositiveInt, Seconds, Section

_OTLP_URL = re.compile(r"https?://[^/\s]+/\S+")


class ServerConfig(Section):
    """Where the HTTP server of `tprt serve` listens, who may ask, and how much."""

    host: str = "127.0.0.1"
    """Address to bind; one that others can reach needs an API key, or allow_anonymous."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one."""
    drain_timeout_s: Seconds = 30.0
    """Longest time that running requests have to finish after SIGTERM; what has not finished then is ended."""
    served_model_name: str | None = None
    """Name that requests give as `model`; none: the last part of model.path."""
    api_key_file: str | None = None
    """File with API keys, one a line; any of them opens the server, and so does $TPRT_API_KEY."""
    allow_anonymous: bool = False
    """Serve without API keys on an address that others can reach."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of these origins may ask (CORS); "*": of all; none: only the server's own page."""
    ssl_certfile: str | None = None
    """PEM file of the certificate, with those between it and the root; then the server speaks HTTPS only."""
    ssl_keyfile: str | None = None
    """PEM file of the certificate's private key; none: it is in ssl_certfile."""
    max_queued_requests: Annotated[int, Field(ge=0)] = 1024
    """Requests beyond scheduler.max_num_seqs that may wait for a place; more are refused with status 429."""
    request_timeout_s: Seconds | None = None
    """A request ends at this age with what it has, or with status 429 if that is nothing; none: never."""
    max_body_bytes: PositiveInt = 16 * 1024 * 1024
    """Largest request body; a larger one is refused with status 413."""
    log_requests: bool = True
    """One log line for each request, without its text."""

    otlp_traces_endpoint: str | None = None
    """Send a span of each request there, as in http://127.0.0.1:4318/v1/traces; needs the extra tprt[otel]."""
    otlp_service_name: str | None = None
    """The service's name in its spans; none: $OTEL_SERVICE_NAME, or tprt."""

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_a_whole_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _OTLP_URL.fullmatch(endpoint):
            raise ValueError(
                f"{endpoint!r} is no address for OTLP over HTTP; give the whole URL, its path too, as in"
                " http://127.0.0.1:4318/v1/traces (port 4317 is mostly gRPC, which is not spoken here)"
            )
        return endpoint

    @model_validator(mode="after")
    def _key_has_a_certificate(self) -> ServerConfig:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile is given without ssl_certfile; give both, or neither")
        return self

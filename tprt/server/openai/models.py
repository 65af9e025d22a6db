"""`GET /v1/models`: the one model that there is.

Knows nothing of what it can do.
"""

from __future__ import annotations

from tprt.server.http.context import ServerContext
from tprt.server.openai.generation import require_model


def list_models(context: ServerContext) -> dict[str, object]:
    """Return the list."""
    return {"object": "list", "data": [_model(context)]}


def get_model(context: ServerContext, model_id: str) -> dict[str, object]:
    """Return the model.

    Raises:
        ApiError: there is no model of that name.
    """
    require_model(context, model_id)
    return _model(context)


def _model(context: ServerContext) -> dict[str, object]:
    ready = context.engine.ready
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "tprt",
        "max_model_len": None if ready is None else ready.max_model_len,
    }

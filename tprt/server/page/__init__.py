"""The live page at `/`: what the engine and its ranks do, for a person, and a box to try the model."""

from tprt.server.page.router import make_page_router

__all__ = ["make_page_router"]

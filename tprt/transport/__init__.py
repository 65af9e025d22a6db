"""Lanes between processes: protocols, the shared-memory ring, ZeroMQ, and their twin in one process."""

"""Layers that hold this rank's shard and sum over ranks where the full result needs it."""

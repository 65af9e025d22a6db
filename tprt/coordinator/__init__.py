"""The engine's brain: sequences, KV blocks, the scheduler, and the loop between clients and workers."""

"""A multi-process tensor-parallel runtime for large language models."""

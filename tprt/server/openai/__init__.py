"""The OpenAI protocol: what its requests and answers look like, and the handlers of its endpoints."""

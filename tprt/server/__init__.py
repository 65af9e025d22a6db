"""What stands between clients and the coordinator: text, requests and, over HTTP, the OpenAI protocol."""

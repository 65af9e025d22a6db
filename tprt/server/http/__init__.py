"""The HTTP side of the server: the application, who may use it, errors and event streams."""

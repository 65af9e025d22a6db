"""`tprt serve`: the HTTP server's process, its socket, and the command."""

"""The library over a running daemon: the same interface as the embedded one, through a unix socket or TCP."""

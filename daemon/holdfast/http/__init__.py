"""The HTTP interface: one table of routes on a unix socket and on loopback TCP."""

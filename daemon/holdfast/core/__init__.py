"""The pure heart: an op and the state give an event; an event changes the state. No I/O, no clock."""

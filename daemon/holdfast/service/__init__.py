"""The process around the engine: its log, signals, services, start, stop, systemd."""

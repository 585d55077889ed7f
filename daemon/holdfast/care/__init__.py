"""Care of the data: letting go in time, taking over, mirroring."""

"""Bytes on the disk and the order in which they get there; nothing here knows what they mean."""

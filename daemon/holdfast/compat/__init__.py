"""Modules that take the place of a bot's own storage code, so that changing one import is enough."""

"""The command line: a thin front, one module for each group of commands."""

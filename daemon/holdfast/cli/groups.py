"""Groups of commands."""

from __future__ import annotations

import click


class InOrder(click.Group):
    """Shows its commands in the order in which they were added: reading before changing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

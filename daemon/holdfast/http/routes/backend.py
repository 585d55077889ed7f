"""What the handlers need of the daemon behind them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import tzinfo
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.http.reply import Reply
from holdfast.settings import Settings
from holdfast.values import ValueLimits

if TYPE_CHECKING:
    from holdfast.care.moments import Target
    from holdfast.care.restore import RestoreState
    from holdfast.care.restore_plan import RestorePlan
    from holdfast.care.seal import AgeSeal
    from holdfast.engine import Engine
    from holdfast.ops import FlushReport


class Admin(Protocol):
    """What operators may ask over HTTP."""

    async def flush(self) -> FlushReport:
        """Flush now; returns when everything is on disk."""

    async def reload(self) -> Mapping[str, Any]:
        """Read the settings again; raises SettingsError when they are invalid, and the old ones stay."""

    def restore(self, target: Target, planned: RestorePlan, seal: AgeSeal | None) -> RestoreState:
        """Begin to restore everything; raises Conflict while another restore is under way. On the event loop."""

    def restore_state(self) -> RestoreState:
        """How the restore under way, or the last one, stands."""

    def status(self) -> Mapping[str, Any]:
        """Counts, seqs, sizes, uptime, last flush."""


class Backend(Protocol):
    """The daemon as a handler sees it.

    Attributes:
        settings: as of the last reload.
        record_limits: of one record's value.
        batch_limits: of the body of a batch; each record in it is checked again by the engine.
        zone: in which times without an offset are read.
    """

    settings: Settings
    record_limits: ValueLimits
    batch_limits: ValueLimits
    zone: tzinfo

    @property
    def is_alone(self) -> bool:
        """Whether the request in hand is all there is to do: nobody is held up by what it does at once."""

    @property
    def admin(self) -> Admin:
        """The operator's side."""

    @property
    def engine(self) -> Engine:
        """The engine; raises Unavailable while it is loading."""

    @property
    def listening(self) -> list[str]:
        """Where, as ``unix:PATH`` or ``tcp:HOST:PORT``."""

    @property
    def open_streams(self) -> int:
        """How many event streams there are."""

    def scrape(self, accept: str) -> Reply:
        """The metrics, in the form that *accept*, the header, names; blocks."""

    def readiness(self) -> Mapping[str, Any]:
        """``state``, and the ``reasons`` when it is degraded."""

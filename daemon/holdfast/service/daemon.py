"""The wiring: every part of the daemon is made, connected, started and stopped here."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import structlog

from holdfast import __version__
from holdfast.care import backup, verify
from holdfast.care.copies import CLOSE_S, Copies
from holdfast.care.moments import Target
from holdfast.care.restore import RestoreState
from holdfast.care.restore_plan import RestorePlan
from holdfast.care.retention import CHECK_EVERY_S, Daily
from holdfast.care.seal import AgeSeal, key_problem
from holdfast.care.space import LOOK_EVERY_S
from holdfast.engine import Engine
from holdfast.errors import HoldfastError, SettingsError, Unavailable
from holdfast.http.app import HttpService
from holdfast.ops import FlushReport
from holdfast.recovery import open_engine
from holdfast.service.flusher import FlushQueue
from holdfast.service.inbox import InboxService
from holdfast.service.logging import Log, secure_standard_descriptors
from holdfast.service.restoring import Restores
from holdfast.service.shutdown import FinalStep, ShutdownManager
from holdfast.service.supervisor import Interval, Supervisor, reason_of, stop_service, unexpected
from holdfast.service.systemd import Notifier, inherited_sockets
from holdfast.service.threads import in_thread
from holdfast.service.watch import FileWatch
from holdfast.settings import LoadedSettings, Settings, changes, reloaded

EXIT_FAILED = 1

EXPIRE_EVERY_S = 10.0
SIZE_CHECK_EVERY_S = 1.0
STATUS_EVERY_S = 10.0

FLUSH_RETRY_S = 30.0
"""After a flush that failed, the least time to the next one that the size of the journal asks for."""

KEY_CHECK_EVERY_S = 60.0
"""The key for encrypted backups may stand on a disk that is mounted later."""

LOAD_SIGN_S = 5.0
"""Between two messages to systemd while loading; each asks for LOAD_EXTEND_S."""

LOAD_EXTEND_S = 60.0

LOAD_CANCEL_S = 1.5
"""What a cancelled start gets to notice; after that the process ends without it, which changes nothing on disk."""

GC_THRESHOLDS = (20_000, 10, 20)
"""Nearly everything here is freed by its reference count; the ops of one batch alone are more objects than the 700
after which Python would look for cycles."""

PAUSE_S = 5.0
"""What requests in flight get to finish before a restore takes the data away."""

LOG_DRAIN_S = 2.0
BARRIER_S = 1.0


def run(load_settings: Callable[[], LoadedSettings]) -> int:
    """Serve until told to stop; return the exit code of CONTRACT section 4.

    *load_settings* is called once here, and again in a thread at each reload. To be called in the main
    thread, once in a process. Signals stay ignored afterwards, so that one that comes late cannot turn a clean
    stop into a kill. Where a thread is left that would keep the process, this ends it and does not return.
    """
    # Until there is a loop to note them, these must not kill.
    _ignore(signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    secure_standard_descriptors()
    # systemd's watchdog kills with SIGABRT: the stack of every thread goes to stderr.
    faulthandler.enable(2)
    notifier = Notifier()
    try:
        loaded = load_settings()
        sockets = inherited_sockets()
    except SettingsError as error:
        # Before there are settings there is no log.
        with contextlib.suppress(OSError):
            os.write(2, f"holdfast: {' '.join(str(error).split())}\n".encode("utf-8", "backslashreplace"))
        return error.exit_code
    log = Log(loaded.settings.log)
    log.install()

    loop = _new_event_loop()
    asyncio.set_event_loop(loop)
    daemon = _Daemon(loaded, load_settings, log, notifier, sockets)
    try:
        code = loop.run_until_complete(daemon.main())
    except Exception as error:
        code = daemon.failed(error)
    finally:
        _ignore(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    _close(loop)
    notifier.barrier(BARRIER_S)
    log.drain(LOG_DRAIN_S, close=True)
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        # Somebody's executor has a job that does not end, and the interpreter would wait for it.
        os._exit(code)
    return code


class _Daemon:
    """The process between its first log line and its last; also what the HTTP service may ask of it."""

    def __init__(
        self,
        loaded: LoadedSettings,
        load_settings: Callable[[], LoadedSettings],
        log: Log,
        notifier: Notifier,
        sockets: list[socket.socket],
    ) -> None:
        self._loaded = loaded
        self._settings: Settings = loaded.settings
        self._load_settings = load_settings
        self._log_output = log
        self._log = structlog.get_logger()
        self._notifier = notifier
        self._sockets = sockets
        self._started_at = time.monotonic()
        self._reload_lock = asyncio.Lock()
        self._signs_of_life: asyncio.Task[None] | None = None
        self._progress = "loading"
        self._flush_again_at = 0.0
        self._shutdown = ShutdownManager(
            timeout_s=self._settings.shutdown_timeout, notifier=notifier, last_resort=self._give_up
        )
        self._restores = Restores(lambda: self._shutdown.is_requested)
        self._is_restoring = False
        self._engine: Engine | None = None
        self._http: HttpService | None = None
        self._flush_interval: Interval | None = None

    async def main(self) -> int:
        """Load, serve, stop; the exit code."""
        noted = self._note_signals()
        self._log.info("daemon.started", version=__version__, pid=os.getpid(), data_dir=str(self._settings.data_dir))
        try:
            engine = await self._load()
        except Exception as error:
            return self.failed(error)
        if engine is None:
            return 0 if await self._shutdown.stop() else EXIT_FAILED
        self._take(engine)
        # The final flush, then the journal closed and the lock released, whatever the flush said.
        self._shutdown.final_steps.append(FinalStep("engine", self._close_engine))
        http = HttpService(
            engine,
            self._settings,
            readiness=self.readiness,
            admin=self,
            sockets=self._sockets or None,
            lines_dropped=lambda: self._log_output.lines_dropped,
        )
        supervisor = self._services_of(engine)
        front = Supervisor([FileWatch(self._loaded.watch, self._reload_when_changed), _Http(http)])
        try:
            await supervisor.start()
            try:
                await front.start()
            except BaseException:
                await _stop_all(supervisor)
                raise
        except Exception as error:
            await in_thread("close", lambda: engine.close(flush=False))
            # An address that cannot be used now may be free in a moment: not the exit code after which nobody tries again.
            return self.failed(error, EXIT_FAILED if isinstance(error, SettingsError) else None)
        self._http = http
        serving = self._serve_signals(noted)
        self._ready()

        while not await self._stops_before_restore():
            try:
                supervisor = await self._restore_and_start(supervisor, http)
            except Exception as error:
                await _stop_all(front)
                return self.failed(error)
        for task in serving:
            task.cancel()
        if self._engine is not None:
            # Whoever waits for a backup over HTTP is not waited for.
            self._engine.backups.cancel()
        clean = await self._shutdown.stop(
            stop_accepting=http.stop_accepting,
            finish_requests=http.drain,
            services=(*supervisor.running, *front.running),
        )
        if clean:
            return 0
        self._log.error(
            "daemon.failed", reason=f"the stop was not clean: {self._shutdown.failure}", exit_code=EXIT_FAILED
        )
        return EXIT_FAILED

    def _take(self, engine: Engine) -> None:
        """Serve *engine* from now on."""
        # What was loaded is looked at no more: a million ids would hold up every full collection for 75 ms.
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        engine.on_broken = self._journal_broke
        self._engine = engine

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _services_of(self, engine: Engine) -> Supervisor:
        """What runs beside *engine*: started from first to last, stopped from last to first, before it is closed."""
        self._flusher = FlushQueue(engine)
        self._flush_interval = Interval("flush", self._settings.flush_every, self._flush_regularly)
        supervisor = Supervisor()
        supervisor.add(self._flusher)
        supervisor.add(self._flush_interval)
        supervisor.add(Interval("size check", SIZE_CHECK_EVERY_S, self._flush_when_large))
        supervisor.add(Interval("expire", EXPIRE_EVERY_S, engine.expire))
        retention = Daily(engine, lambda: self._shutdown.is_requested)
        supervisor.add(Interval("retention", CHECK_EVERY_S, retention.run_when_due))
        supervisor.add(_BackingUp(engine))
        verifying = verify.Daily(engine, lambda: self._shutdown.is_requested)
        supervisor.add(Interval("verify", verify.DAILY_CHECK_S, verifying.run_when_due))
        supervisor.add(Interval("disk", LOOK_EVERY_S, lambda: engine.look_at_disk(lambda: self._shutdown.is_requested)))
        supervisor.add(_Copying(engine))
        supervisor.add(Interval("backup key", KEY_CHECK_EVERY_S, self._look_at_key))
        supervisor.add(Interval("status", STATUS_EVERY_S, self._tell_status))
        supervisor.add(
            InboxService(engine, progress=self._note_long_start, is_stopping=lambda: self._shutdown.is_requested)
        )
        return supervisor

    # Restore.

    async def _stops_before_restore(self) -> bool:
        """Wait until a stop is requested, or a restore wants the daemon to pause; whether it is the stop."""
        waiting = [asyncio.create_task(self._shutdown.requested()), asyncio.create_task(self._restores.is_due.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        return self._shutdown.is_requested

    async def _restore_and_start(self, supervisor: Supervisor, http: HttpService) -> Supervisor:
        """Stop what runs beside the engine, put the restored state in its place, start again; what runs then.

        The process, its addresses and its connections stay. When a stop is requested meanwhile nothing runs.
        """
        # Settings that change now wait for the new engine.
        async with self._reload_lock:
            self._notifier.reloading()
            self._notifier.status("restoring a backup")
            self._is_restoring = True
            await http.detach("restoring a backup", PAUSE_S)
            await _stop_all(supervisor)
            await in_thread("restore", self._swap)
            # What was frozen in memory may be in cycles, and is needed no more.
            gc.unfreeze()
            gc.collect()
            engine = await self._load()
            self._is_restoring = False
            if engine is None:
                return Supervisor()
            self._take(engine)
            supervisor = self._services_of(engine)
            try:
                await supervisor.start()
            except Exception:
                await in_thread("close", lambda: engine.close(flush=False))
                raise
            http.attach(engine)
            self._notifier.ready(self._status_line())
        self._concluding = asyncio.create_task(self._restores.conclude(engine))
        return supervisor

    def _swap(self) -> None:
        engine, self._engine = self._engine, None
        assert engine is not None
        now_ms = engine.now_ms()
        try:
            engine.close()
        except (HoldfastError, OSError) as error:
            # All is in the journal; what is not in the snapshots would be lost to the swap.
            self._restores.fail(error)
            return
        self._restores.swap(now_ms)

    # Start.

    async def _load(self) -> Engine | None:
        """The engine; None when a stop was requested before it was there."""
        cancelled = threading.Event()

        def load() -> Engine:
            engine = open_engine(
                self._settings, cancelled=cancelled, progress=self._note_progress, log=structlog.get_logger()
            )
            self._look_at_key_for(engine)
            return engine

        loading = asyncio.create_task(in_thread("loading", load))
        requested = asyncio.create_task(self._shutdown.requested())
        while not loading.done() and not requested.done():
            self._notifier.extend_timeout(LOAD_EXTEND_S)
            self._notifier.status(self._progress)
            await asyncio.wait({loading, requested}, timeout=LOAD_SIGN_S, return_when=asyncio.FIRST_COMPLETED)
        requested.cancel()
        if not self._shutdown.is_requested:
            return await loading
        cancelled.set()
        await asyncio.wait({loading}, timeout=LOAD_CANCEL_S)
        if loading.done():
            try:
                engine = await loading
            except Unavailable:
                return None
            await in_thread("close", lambda: engine.close(flush=False))
        # A loader that has not noticed yet ends with the process; it writes nothing before it is done.
        return None

    def _note_progress(self, progress: str) -> None:
        self._progress = progress
        self._notifier.status(progress)

    def _note_long_start(self, progress: str) -> None:
        """May be called from any thread."""
        self._notifier.extend_timeout(LOAD_EXTEND_S)
        self._note_progress(progress)

    def _ready(self) -> None:
        assert self._http is not None
        self._shutdown.running()
        duration_ms = round((time.monotonic() - self._started_at) * 1000, 1)
        self._log.info("daemon.ready", listen=self._http.listening, duration_ms=duration_ms)
        self._notifier.ready(self._status_line())
        if self._notifier.watchdog_s is not None:
            # No service: signs of life are given until the very end.
            self._signs_of_life = asyncio.create_task(self._give_signs_of_life(self._notifier.watchdog_s))
        if self._log_output.is_terminal:
            self._log_output.show(_banner(self._settings, self._http.listening))

    # Signals.

    def _note_signals(self) -> dict[int, asyncio.Event]:
        """From now on signals are noted; the events say which of those that may wait have come."""
        loop = asyncio.get_running_loop()
        noted: dict[int, asyncio.Event] = {
            one: asyncio.Event() for one in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
        }

        # signal.signal and not loop.add_signal_handler, which leaves the default, deadly, action behind when
        # the loop closes.
        def note(number: int, _frame: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                if number in noted:
                    loop.call_soon_threadsafe(noted[number].set)
                else:
                    self._shutdown.note()
                    loop.call_soon_threadsafe(self._shutdown.request, signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGINT, *noted):
            signal.signal(number, note)
        return noted

    def _serve_signals(self, noted: dict[int, asyncio.Event]) -> list[asyncio.Task[None]]:
        actions: dict[int, Callable[[], Awaitable[object]]] = {
            signal.SIGUSR1: lambda: self._try_to_flush("signal"),
            signal.SIGUSR2: self._report,
            signal.SIGHUP: self.reload,
        }
        return [asyncio.create_task(_act_when_noted(noted[number], action)) for number, action in actions.items()]

    async def _report(self) -> None:
        self._log.info("status.report", **await in_thread("status", self.status))

    # Regular work.

    async def _flush_regularly(self) -> None:
        await self._try_to_flush("interval")

    async def _flush_when_large(self) -> None:
        assert self._engine is not None
        if self._engine.flush_wanted() and time.monotonic() >= self._flush_again_at:
            await self._try_to_flush("size")

    async def _try_to_flush(self, reason: str) -> None:
        try:
            await self.flush(reason)
        except (HoldfastError, OSError):
            # The engine has told it as flush.failed; on a full disk there is no point in trying every second.
            self._flush_again_at = time.monotonic() + FLUSH_RETRY_S

    def _look_at_key(self) -> None:
        if self._engine is not None:
            self._look_at_key_for(self._engine)

    def _look_at_key_for(self, engine: Engine) -> None:
        """Have ``degraded`` say that the key for encrypted backups cannot be read, as long as that is so; blocks."""
        problem = key_problem(self._settings)
        if not problem:
            engine.care_notes.pop("key", None)
        elif engine.care_notes.get("key") != problem:
            engine.care_notes["key"] = problem
            self._log.warning("backup.key_missing", reason=problem)

    async def _tell_status(self) -> None:
        self._notifier.status(self._status_line())

    async def _give_signs_of_life(self, watchdog_s: float) -> None:
        """From the event loop, so that a blocked loop is noticed; only while the journal moves, so that this is, too."""
        while True:
            # While a restore swaps the data there is none, and the loop alone is a sign of life.
            engine = self._engine
            if engine is None or time.monotonic() - engine.journal_progress() < watchdog_s:
                self._notifier.watchdog()
            await asyncio.sleep(watchdog_s / 2)

    def _status_line(self) -> str:
        assert self._engine is not None
        degraded = self._engine.degraded
        if degraded:
            return f"degraded: {'; '.join(degraded)}"
        return f"serving {self._engine.count('sessions')} sessions, {self._engine.count('orders')} pending orders"

    # What HTTP may ask.

    def readiness(self) -> dict[str, Any]:
        """The state of the process, and what is wrong with its data."""
        if self._is_restoring:
            return {"state": "RESTORING", "reasons": []}
        return {"state": str(self._shutdown.state), "reasons": list(self._engine.degraded) if self._engine else []}

    async def flush(self, reason: str = "api") -> FlushReport:
        """Flush now, or share the flush that others wait for."""
        return await self._flusher.flush(reason)

    async def reload(self) -> dict[str, list[str]]:
        """Read the settings again; apply what can change while running.

        Returns the names that changed under ``changed``, those that wait for a restart under ``needs_restart``.

        Raises:
            SettingsError: the new settings are invalid; nothing was changed.
        """
        return await self._reload(tell_always=True)

    def restore(self, target: Target, planned: RestorePlan, seal: AgeSeal | None) -> RestoreState:
        """Begin to restore everything; errors as ``Restores.begin``."""
        if self._engine is None:
            raise Unavailable("restoring a backup; try again soon")
        return self._restores.begin(self._engine, target, planned, seal)

    def restore_state(self) -> RestoreState:
        """How the restore under way, or the last one, stands."""
        return self._restores.state

    def status(self) -> dict[str, Any]:
        """Everything an operator asks first. May be called from any thread."""
        engine = self._engine
        if engine is None:
            raise Unavailable("restoring a backup; try again soon")
        return engine.status() | {
            "state": str(self._shutdown.state),
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_at, 1),
            "listen": self._http.listening if self._http else [],
        }

    async def _reload_when_changed(self) -> None:
        with contextlib.suppress(SettingsError):  # told in the log
            await self._reload(tell_always=False)

    async def _reload(self, *, tell_always: bool) -> dict[str, list[str]]:
        async with self._reload_lock:
            self._notifier.reloading()
            try:
                loaded = await in_thread("reload", self._load_settings)
            except Exception as error:
                refusal = error if isinstance(error, SettingsError) else SettingsError(reason_of(error))
                self._log.error("config.rejected", reason=str(refusal), exc_info=unexpected(error))
                raise refusal from error
            else:
                changed, needs_restart = changes(self._settings, loaded.settings)
                self._apply(reloaded(self._settings, loaded.settings))
                await in_thread("backup key", self._look_at_key)
                if changed or needs_restart or tell_always:
                    self._log.info("config.reloaded", changed=changed, needs_restart=needs_restart)
                return {"changed": changed, "needs_restart": needs_restart}
            finally:
                self._notifier.ready(self._status_line())

    def _apply(self, settings: Settings) -> None:
        assert self._engine is not None and self._http is not None and self._flush_interval is not None
        self._settings = settings
        self._log_output.change(settings.log)
        self._engine.reconfigure(settings)
        self._http.reconfigure(settings)
        self._flush_interval.every_s = settings.flush_every
        self._shutdown.timeout_s = settings.shutdown_timeout

    # Ends that are not graceful.

    def failed(self, error: Exception, code: int | None = None) -> int:
        """Log *error* as the reason for the exit code, its own unless *code* is given; return that."""
        if code is None:
            code = error.exit_code if isinstance(error, HoldfastError) else EXIT_FAILED
        self._log.error("daemon.failed", reason=reason_of(error), exit_code=code, exc_info=unexpected(error))
        return code

    def _journal_broke(self, error: HoldfastError) -> None:
        """Called by whoever writes the journal: nothing may be acknowledged, flushed or synced any more."""
        self._end_at_once(str(error))

    def _give_up(self) -> NoReturn:
        self._end_at_once("the stop took longer than shutdown_timeout; the next start replays the journal")

    def _end_at_once(self, reason: str) -> NoReturn:
        self._log.error("daemon.failed", reason=reason, exit_code=EXIT_FAILED)
        self._log_output.drain(LOG_DRAIN_S, close=True)
        os._exit(EXIT_FAILED)


async def _stop_all(supervisor: Supervisor) -> None:
    """Stop what *supervisor* has started, newest first."""
    for service in reversed(supervisor.running):
        await stop_service(service.name, service.stop, service.stop_deadline_s)


class _Http:
    """The HTTP service, as the supervisor sees it: last started, first stopped."""

    name = "http"
    stop_deadline_s = 5.0

    def __init__(self, http: HttpService) -> None:
        self.start = http.start
        self.stop = http.stop


class _BackingUp(Interval):
    """The daily backup and its proof; one under way is broken off by a stop, and leaves nothing half made."""

    def __init__(self, engine: Engine) -> None:
        super().__init__("backup", backup.CHECK_EVERY_S, engine.backups.run_when_due)
        self._backups = engine.backups

    async def stop(self) -> None:
        """Break off what is under way."""
        self._backups.cancel()
        await super().stop()


class _Copying:
    """The copies of the backups, as a service; what is half way to the second place when it stops is done again later."""

    name = "backup copies"
    stop_deadline_s = CLOSE_S + 1.0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._copies = Copies(engine.settings.data_dir, lambda: engine.settings, engine.now_ms, structlog.get_logger())

    async def start(self) -> None:
        self._engine.copies = self._copies
        self._copies.start()

    async def stop(self) -> None:
        await in_thread(self.name, self._copies.close)


async def _act_when_noted(noted: asyncio.Event, action: Callable[[], Awaitable[object]]) -> None:
    """Do *action* after each signal; those that come while it runs are one more."""
    log = structlog.get_logger()
    while True:
        await noted.wait()
        noted.clear()
        try:
            await action()
        except SettingsError:
            continue  # told in the log
        except Exception as error:
            log.error("signal.failed", reason=reason_of(error), exc_info=unexpected(error))


def _ignore(*numbers: int) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it does not install everywhere, and nothing but speed depends on it
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Close *loop* without waiting for what does not end."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=0.5))
    loop.close()


def _banner(settings: Settings, listening: list[str]) -> str:
    """What a person who starts the daemon by hand wants to know."""
    token = settings.data_dir / "token"
    lines = ["", f"Holdfast {__version__} keeps {settings.data_dir}", f"The token for TCP is in {token}", ""]
    for address in listening:
        scheme, _, rest = address.partition(":")
        if scheme == "unix":
            lines.append(f"  curl --unix-socket {shlex.quote(rest)} http://localhost/v1/sessions")
        else:
            header = f'-H "Authorization: Bearer $(cat {shlex.quote(str(token))})"'
            lines.append(f"  curl {header} http://{rest}/v1/sessions")
    return "\n".join([*lines, "", "Ctrl-C stops it.", ""])

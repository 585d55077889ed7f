"""A lab for the tests that need a real systemd, and services in it that each test has for itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.systemd.lab import Lab, LabUnavailable, Service

MakeService = Callable[[], Service]

_numbers = itertools.count(1)


def booted() -> Iterator[Lab]:
    """A lab with the package installed; the test is skipped, with the reason, on a machine that cannot have one."""
    try:
        lab = Lab()
    except LabUnavailable as error:
        pytest.skip(str(error))
    try:
        lab.install_package()
        yield lab
    finally:
        lab.end()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """One boot for all who do not change what the others build on; the units are installed."""
    for lab in booted():
        lab.install_units()
        yield lab


@pytest.fixture
def make_service(lab: Lab) -> Iterator[MakeService]:
    """Makes instances of the template that nobody else uses; what they logged is shown when the test fails."""
    made: list[Service] = []

    def make() -> Service:
        made.append(Service(lab, f"t{next(_numbers)}"))
        return made[-1]

    yield make
    for service in made:
        _discard(service)


@pytest.fixture
def service(make_service: MakeService) -> Service:
    """One such instance."""
    return make_service()


@pytest.fixture
def main_service(lab: Lab) -> Iterator[Service]:
    """``holdfast.service`` with ``holdfast.socket``, empty."""
    service = Service(lab)
    yield service
    lab.systemctl("stop", "holdfast.socket", check=False)
    _discard(service)


def _discard(service: Service) -> None:
    lab = service.lab
    print(lab.exec("journalctl", "--no-pager", "-n", "40", "-o", "short-monotonic", f"--unit={service.unit}").stdout)
    lab.systemctl("kill", "--signal=KILL", service.unit, check=False)
    lab.systemctl("stop", service.unit, check=False)
    lab.systemctl("reset-failed", service.unit, check=False)
    lab.exec("rm", "-rf", f"/etc/systemd/system/{service.unit}.d", service.inside_data_dir)
    lab.systemctl("daemon-reload")

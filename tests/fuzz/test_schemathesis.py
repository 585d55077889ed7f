"""Requests made from the OpenAPI document, right ones and wrong ones, sent to a real daemon: no answer is undocumented."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, seed, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from holdfast.settings import parse_duration
from tests.crash.harness import serving
from tests.document_harness import check_answer, operation, whole

FULL = os.environ.get("HOLDFAST_CRASH") == "full"
SEED = int(os.environ.get("HOLDFAST_CRASH_SEED", "20261121"))
ANSWER_S = 20.0

pytestmark = pytest.mark.crash

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]

# Any refusal will do, since what is wrong may come second to a condition, a lease or a limit; but no success.
_REFUSED = ["400", "404", "405", "409", "412", "413", "415", "422", "423"]

# Every request has its token; what happens to those without has tests of its own.
schema = schemathesis.openapi.from_dict(
    whole() | {"security": []},
    config=SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": _REFUSED}}}),
)


class Target(NamedTuple):
    """Where the daemon listens, and what it takes to be heard."""

    url: str
    headers: dict[str, str]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A daemon of its own, which must be well and stop cleanly after all that."""
    data_dir = tmp_path_factory.mktemp("schemathesis") / "data"
    with serving(data_dir, "--listen", "tcp:127.0.0.1:0") as daemon:
        ready = next(event for event in daemon.events() if event["event"] == "daemon.ready")
        address = next(one for one in ready["listen"] if one.startswith("tcp:")).removeprefix("tcp:")
        token = (data_dir / "token").read_text().strip()
        yield Target(f"http://{address}", {"Authorization": f"Bearer {token}"})
        assert daemon.stop() == 0
        assert "request.failed" not in {event["event"] for event in daemon.events()}


@schema.exclude(operation_id="events").parametrize()
@seed(SEED)
@settings(max_examples=200 if FULL else 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_documented(case: Case, target: Target):
    """Whatever is sent, the status, the media type, the headers and the body of the answer are in the document, nothing
    is a 5xx, and what the document forbids is refused."""
    make_impatient(case.body)
    case.call_and_validate(base_url=target.url, headers=target.headers, checks=CHECKS, timeout=ANSWER_S)


@schema.include(operation_id="events").parametrize()
@seed(SEED)
@settings(max_examples=200 if FULL else 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_a_stream_begins_as_documented_or_is_refused(case: Case, target: Target):
    """The same for the event stream, of which only the beginning is looked at, since it does not end."""
    request = case.as_transport_kwargs(base_url=target.url, headers=target.headers)
    with requests.request(**request, stream=True, timeout=ANSWER_S) as answer:
        body = b"" if answer.status_code == 200 else answer.content

        assert answer.status_code < 500
        if answer.status_code == 405:
            assert answer.headers["Allow"] == "GET, HEAD"
        elif body:
            check_answer(operation("events"), answer.status_code, answer.headers, body)
        else:
            assert answer.headers["Content-Type"] == "text/event-stream"


def make_impatient(body: object) -> None:
    """Let *body*, when it is that of a lease, stand in line for no minute."""
    if isinstance(body, dict):
        try:
            wait_s = parse_duration(body.get("wait"))
        except ValueError:
            return
        body["wait"] = min(wait_s, 0.05)

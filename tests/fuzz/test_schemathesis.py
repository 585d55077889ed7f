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

from tests.crash.harness import serving
from tests.document_harness import whole

FULL = os.environ.get("HOLDFAST_CRASH") == "full"
SEED = int(os.environ.get("HOLDFAST_CRASH_SEED", "20261121"))
ANSWER_S = 20.0

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]

# Beside the usual ones: a condition, and a limit, may be looked at before what is wrong.
_REFUSED = ["400", "404", "405", "412", "413", "415", "422"]

schema = schemathesis.openapi.from_dict(
    whole(), config=SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": _REFUSED}}})
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
@settings(max_examples=500 if FULL else 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_documented(case: Case, target: Target):
    """Whatever is sent, the status, the media type, the headers and the body of the answer are in the document, nothing
    is a 5xx, and what the document forbids is refused."""
    case.call_and_validate(base_url=target.url, headers=target.headers, checks=CHECKS, timeout=ANSWER_S)

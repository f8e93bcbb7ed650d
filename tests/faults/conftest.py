"""The whole sets end with the page that tells of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> object:
    """The trials of the row that the test's ``row`` mark names."""
    from ledger import FULL, Ledger

    made = Ledger(request.node.get_closest_marker("row").args[0])
    if not FULL and not made.row.few:
        pytest.skip("done by `make test-faults` alone")
    return made


def pytest_sessionfinish(session: pytest.Session) -> None:
    from ledger import FULL, publish

    if FULL and not session.config.getoption("collectonly"):
        publish()

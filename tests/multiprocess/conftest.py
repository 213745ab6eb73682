"""What the tests of several processes share."""

from __future__ import annotations

import functools

import pytest

from processes import two_hosts


@functools.cache
def reason() -> str | None:
    """Why this machine cannot make two hosts of itself, or None; found out once."""
    return two_hosts.why_not()


@pytest.fixture
def hosts():
    """Two hosts joined by a cable; the test is skipped where they cannot be made."""
    if reason():
        pytest.skip(reason())
    with two_hosts.joined() as both:
        yield both

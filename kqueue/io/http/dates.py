"""Dates as servers write them (RFC 9110, section 5.6.7)."""

from __future__ import annotations


def moment_of(text: str) -> float | None:
    """`text` as seconds since 1970; None: it is no date."""
    from email.utils import mktime_tz, parsedate_tz  # loaded only where a server sends dates

    try:
        date = parsedate_tz(text)
        return None if date is None else float(mktime_tz(date))
    except (ValueError, OverflowError):
        return None

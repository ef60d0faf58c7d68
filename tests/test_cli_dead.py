"""`kqueue retry` and `kqueue forget`: in bulk, interrupted, without a daemon and with one, on both brokers."""

from __future__ import annotations




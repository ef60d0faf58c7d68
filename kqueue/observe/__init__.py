"""Observing: what subscribes to `kqueue.events` and tells people. Nothing below may import it, and none of it steers anything."""

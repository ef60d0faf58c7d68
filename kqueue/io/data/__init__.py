"""Databases for jobs: `io.redis` and `io.postgres`, with a pool for each URL and loop. What users may import is in kqueue.io."""

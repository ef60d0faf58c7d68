"""Reads its configuration from the environment when it is imported, as applications do."""

import os

from kqueue import job

DATABASE_URL = os.environ["APP_DATABASE_URL"]


@job(isolated=True, keep_result=60)
def database() -> str:
    return DATABASE_URL

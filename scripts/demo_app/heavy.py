"""The heavy jobs of the demonstration: they block, so each runs in a limited child. The supervisor never imports this file."""

from __future__ import annotations

import time

from kqueue import job, progress


def _work(seconds: float) -> None:
    for step in range(10):
        time.sleep(seconds / 10)
        progress((step + 1) / 10)


@job(name="ProcessVideo", timeout=300, max_memory=512, keep_result=60)
def process_video(path: str, seconds: float = 2.0) -> str:
    print(f"transcoding {path}")
    _work(seconds)
    return f"{path} transcoded"


@job(name="GenerateReport", timeout=60, max_memory=128, keep_result=60)
def generate_report(title: str) -> str:
    _work(1.5)
    return f"{title}.pdf"

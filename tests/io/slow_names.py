"""The helper of kqueue.io.names with names of its own, by which a test says what is to happen. Run by its path, as that is."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

spec = importlib.util.spec_from_file_location("names_helper", sys.argv[1])
assert spec is not None
assert spec.loader is not None
names_helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(names_helper)
log = sys.argv[2]


def look_up(name: str) -> list[str]:
    with open(log, "a") as file:
        file.write(f"{name} {os.getpid()}\n")
    word = name.split(".")[0]
    if word == "hangs":
        time.sleep(3600)
    if word == "dies":
        os.kill(os.getpid(), 9)
    if word == "dies-once" and Path(log).read_text().count(name) == 1:
        os.kill(os.getpid(), 9)
    if word == "none":
        raise OSError(-2, "Name or service not known")
    if word == "trouble":
        raise OSError(-3, "Temporary failure in name resolution")
    if word == "both":
        return ["6 ::1 0", "4 127.0.0.1"]
    if word == "dead-first":
        return ["6 100::1 0", "4 127.0.0.1"]
    return ["4 127.0.0.1"]


names_helper.look_up = look_up
names_helper.IDLE_S = float(sys.argv[3])
names_helper.main()

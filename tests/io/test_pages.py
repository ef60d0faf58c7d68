"""The examples in docs/io/ of what is done in other processes: each is run as it stands there, by a real daemon."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kqueue.registry import registry
from tests.daemon import PATIENCE_S, ROOT, Daemon
from tests.io.test_mail import Servers
from tests.io.test_mail import servers as servers  # the fixture

Example = tuple[Daemon, ModuleType]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Example]]:
    """A daemon whose jobs are the example of a page, and that as a module."""
    monkeypatch.setattr(registry, "_jobs", dict(registry._jobs))  # a later test's template would look for them
    daemons: list[Daemon] = []

    def start(page: str) -> Example:
        name = f"page_{page}"
        (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/io" / f"{page}.md").read_text(), re.S)
        path = tmp_path / f"{name}.py"
        path.write_text(block)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        url = f"sqlite:///{tmp_path}/kqueue.db"
        daemons.append(Daemon(tmp_path, url, modules=f"[{name}]", isolated_modules="[]", root=f'{tmp_path}", "{ROOT}'))
        return daemons[-1].start(), module

    yield start
    for daemon in daemons:
        assert daemon.stop() == 0
        daemon.close()


def test_a_program(example: Callable[[str], Example]) -> None:
    daemon, page = example("run")
    assert daemon.dispatch(page.word_count.job("three little words"))[0].result(PATIENCE_S) == 3


def test_a_call(example: Callable[[str], Example]) -> None:
    daemon, page = example("offload")
    expected = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert daemon.dispatch(page.checksum.job(__file__))[0].result(PATIENCE_S) == expected


def test_a_mail(example: Callable[[str], Example], servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.at("starttls", user="app", password="secret", ca_file=servers.ca).items():
        monkeypatch.setenv(f"SMTP_{name.upper()}", str(value))
    daemon, page = example("mail")
    taken, rejected = daemon.dispatch(page.welcome.job("ann@example.org"), page.welcome.job("550@example.org"))
    assert taken.wait(PATIENCE_S)
    assert servers.took()["to"] == ["ann@example.org"]
    assert rejected.wait(PATIENCE_S)
    row = daemon.client.store.show(rejected.id)
    assert row is not None
    assert (row.state, row.counters.attempts) == ("dead", 1), "no retry helps, and none is made"

"""Admission: limits clamp or refuse, and jobs come from allowed places only."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import security as module
from kqueue.codec import MAX_BYTES, Envelope
from kqueue.config_file import make_config
from kqueue.errors import ConfigError, Refused, UsageError
from kqueue.options import JobOptions
from kqueue.registry import Registration
from kqueue.security import (
    Admitted,
    SecurityConfig,
    admit,
    check_dispatch,
    check_handler_path,
    check_module_path,
    find_module_file,
)

UNLIMITED = SecurityConfig(max_memory_mib=0)


def work() -> None: ...


def registration(target: Callable[..., Any] | None = work, **options: Any) -> Registration:
    return Registration("work", JobOptions(**options), target, False, __name__)


def envelope(priority: int = 0, **options: Any) -> Envelope:
    return Envelope("id", "work", [], {}, priority=priority, options=options)


# -- presets and validation -------------------------------------------------------------------------------------------------


def test_without_anything_said_only_memory_and_size_are_limited() -> None:
    assert SecurityConfig() == (0, 512, 0, 0, 0, MAX_BYTES, None, True, None, False, 0, 0, 0, 0)
    assert SecurityConfig().validated() == SecurityConfig()


def test_production_is_strict_and_must_be_told_where_jobs_come_from() -> None:
    security = SecurityConfig.production(allowed_paths=["/srv/app"])
    assert security == (3600, 512, 0, 0, 100_000, MAX_BYTES, ("/srv/app",), True, None, False, 0, 0, 0, 0)
    assert SecurityConfig.production(allowed_paths=(), max_timeout_s=60)[:1] == (60,)
    for overrides in ({}, {"allowed_paths": None}, {"max_timeout_s": 5}):
        with pytest.raises(ConfigError, match=r"production\(\) needs allowed_paths"):
            SecurityConfig.production(**overrides)


def test_development_is_lenient() -> None:
    assert SecurityConfig.development() == (0, 1024, 0, 0, 0, MAX_BYTES, None, False, None, False, 0, 0, 0, 0)
    assert SecurityConfig.development(queue_depth=5).queue_depth == 5


def test_from_kqueue_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KQUEUE_SIGNING_KEY_FILE", raising=False)
    config = make_config(
        {
            "limits": {
                "timeout": "5m",
                "memory": "1GiB",
                "cpu": "1m",
                "files": 64,
                "processes": 5,
                "file_size": "1GiB",
                "concurrent": 9,
                "per_minute": 60,
                "queue_depth": 7,
                "envelope": "2MiB",
            },
            "security": {"allowed_paths": ["app"], "strict": False, "signing_key_file": "key"},
        },
        str(tmp_path),
    )
    security = SecurityConfig.from_config(config.limits, config.security)
    key = f"{tmp_path}/key"
    assert security == (300, 1024, 9, 60, 7, 2 * MAX_BYTES, (f"{tmp_path}/app",), False, key, False, 60, 64, 5, 1024)
    default = make_config()
    assert SecurityConfig.from_config(default.limits, default.security) == SecurityConfig()
    monkeypatch.setenv("KQUEUE_SIGNING_KEY_FILE", "/etc/key")
    assert SecurityConfig.from_config(default.limits, default.security).signing_key_file == "/etc/key"
    assert SecurityConfig.from_config(config.limits, config.security).signing_key_file == f"{tmp_path}/key"


def test_paths_are_made_absolute_and_may_be_path_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert SecurityConfig(allowed_paths=("app",)).validated().allowed_paths == (f"{tmp_path}/app",)
    assert SecurityConfig.production(allowed_paths=[tmp_path]).allowed_paths == (str(tmp_path),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_timeout_s": -1}, "max_timeout_s must be seconds, 0 for no limit, not -1"),
        ({"max_timeout_s": True}, "max_timeout_s must be seconds, 0 for no limit, not True"),
        ({"max_timeout_s": float("nan")}, "max_timeout_s must be seconds, 0 for no limit, not nan"),
        ({"max_timeout_s": float("inf")}, "max_timeout_s must be seconds, 0 for no limit, not inf"),
        ({"max_timeout_s": "1h"}, "max_timeout_s must be seconds, 0 for no limit, not '1h'"),
        ({"max_memory_mib": -1}, "max_memory_mib must be an integer of at least 0 (0 for no limit), not -1"),
        ({"max_files": 15}, "max_files must be at least 16, or 0 for no limit, not 15"),
        ({"max_cpu_s": -1}, "max_cpu_s must be seconds, 0 for no limit, not -1"),
        ({"max_memory_mib": 1.5}, "max_memory_mib must be an integer of at least 0 (0 for no limit), not 1.5"),
        ({"max_concurrent": "5"}, "max_concurrent must be an integer of at least 0 (0 for no limit), not '5'"),
        ({"per_minute": None}, "per_minute must be an integer of at least 0 (0 for no limit), not None"),
        ({"queue_depth": True}, "queue_depth must be an integer of at least 0 (0 for no limit), not True"),
        ({"max_envelope_bytes": 0}, "max_envelope_bytes must be an integer of at least 1024, not 0"),
        ({"strict": 1}, "strict must be True or False, not 1"),
        ({"allowed_paths": "/srv/app"}, "allowed_paths must be a list of paths, not '/srv/app'"),
        ({"allowed_paths": ["/a", 5]}, "allowed_paths must be a list of paths, not ['/a', 5]"),
        ({"allowed_paths": [""]}, "allowed_paths must be a list of paths, none of them empty, not ['']"),
        ({"max_timeouts": 1}, "SecurityConfig has no 'max_timeouts' (did you mean \"max_timeout_s\"?)"),
    ],
)
def test_nonsense_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SecurityConfig.development(**overrides)
    assert message in str(caught.value)
    if "max_timeouts" not in overrides:
        with pytest.raises(ConfigError):
            SecurityConfig()._replace(**overrides).validated()


# -- admission --------------------------------------------------------------------------------------------------------------


def test_options_come_from_the_declaration_unless_the_dispatch_set_them() -> None:
    job = registration(timeout=30, max_attempts=5, backoff=[1, 2])
    assert admit(UNLIMITED, envelope(), job) == Admitted(job, job.options)
    admitted = admit(UNLIMITED, envelope(7, timeout=10, backoff=[5]), job)
    assert admitted.registration is job
    assert admitted.options == job.options._replace(priority=7, timeout=10, backoff=[5])


@pytest.mark.parametrize("dispatched", [True, False], ids=["by the dispatch", "by the declaration"])
@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ({"timeout": 10}, {"timeout": 10}),
        ({"timeout": 300}, {"timeout": 300}),
        ({"timeout": 301}, {"timeout": 300}),
        ({"timeout": 0}, {"timeout": 300}),  # no limit of its own
        ({"max_memory": 128}, {"max_memory": 128}),
        ({"max_memory": 129}, {"max_memory": 128}),
        ({"timeout": 10**6, "max_memory": 10**6}, {"timeout": 300, "max_memory": 128}),
    ],
)
def test_at_run_a_job_is_clamped(asked: dict[str, Any], granted: dict[str, Any], dispatched: bool) -> None:
    for strict in (True, False):
        security = SecurityConfig(max_timeout_s=300, max_memory_mib=128, strict=strict)
        job = registration() if dispatched else registration(**asked)
        options = admit(security, envelope(**asked) if dispatched else envelope(), job).options
        assert options == JobOptions()._replace(**granted)


def test_every_limit_clamps_and_refuses_its_own_option() -> None:
    security = SecurityConfig(max_cpu_s=5, max_files=64, max_processes=2, max_file_size_mib=3)
    within = {"max_cpu": 5, "max_files": 64, "max_processes": 2, "max_file_size": 3}
    assert check_dispatch(security, JobOptions(**within), "work") == JobOptions(**within)
    for option, most in within.items():
        for value in (most + 1, *([0] if option != "max_files" else [])):  # 0 asks for no limit
            asked = JobOptions(**{**within, option: value})
            assert admit(security, envelope(**{option: value}), registration(**within)).options == JobOptions(**within)
            with pytest.raises(UsageError, match=rf"{option} {value}.* is over limits\.{option[4:]} {most}; lower it"):
                check_dispatch(security, asked, "work")
            published = SecurityConfig.from_published({**security.published(), "strict": False})
            assert check_dispatch(published, asked, "work") == JobOptions(**within)


def test_without_limits_nothing_is_clamped() -> None:
    assert admit(UNLIMITED, envelope(timeout=0, max_memory=10**6), registration()).options[:2] == (0, 10**6)


@pytest.mark.parametrize(("asked", "granted"), [(-101, -100), (-100, -100), (100, 100), (101, 100), (10**30, 100)])
def test_priority_is_clamped(asked: int, granted: int) -> None:
    job = registration()
    for _ in range(2):
        assert admit(UNLIMITED, envelope(asked), job).options.priority == granted


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"timeout": -1}, "the envelope's timeout must be seconds, 0 for no limit, not -1"),
        ({"timeout": "soon"}, "the envelope's timeout must be seconds, 0 for no limit, not 'soon'"),
        ({"timeout": 10**400}, "the envelope's timeout "),
        ({"max_memory": 0}, "the envelope's max_memory must be a positive number of MiB, not 0"),
        ({"max_memory": 1.5}, "the envelope's max_memory must be a positive number of MiB, not 1.5"),
        ({"max_attempts": 0}, "the envelope's max_attempts must be an integer of at least 1, not 0"),
        ({"backoff": []}, "the envelope's backoff must be seconds, a list of seconds, a dict of base, factor, cap, jitter, or a "
                          "function (attempt, error) -> seconds, not []"),
        ({"backoff": "computed"}, "the envelope's backoff must be seconds"),
        ({"retry_until": -1}, "the envelope's retry_until must be seconds"),
        ({"retry_on": []}, "the envelope's retry_on is empty"),
        ({"causes": {"lost": "bury"}}, "the envelope's causes: there is no policy for 'lost'"),
        ({"causes": {"memory": {"grow": 10**400}}}, "the envelope's causes: memory: grow must be a number from 1 to 100"),
        ({"keep_result": True}, "the envelope's keep_result must be seconds, 0 for not at all, not True"),
        ({"isolated": False}, "an envelope cannot set 'isolated'; it may set timeout, max_memory,"),
        ({"start": "exec"}, "an envelope cannot set 'start'"),
        ({"queue": "x"}, "an envelope cannot set 'queue'"),
    ],
)
def test_nonsense_in_an_envelope_is_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused) as caught:
        admit(UNLIMITED, envelope(**options), registration())
    assert str(caught.value).startswith(reason)


def test_the_common_case_is_answered_from_memory() -> None:
    security, job = SecurityConfig(max_timeout_s=10), registration(timeout=60)
    first = admit(security, envelope(), job)
    assert first.options.timeout == 10
    assert admit(security, envelope(), job) is first
    assert admit(security, envelope(3), job) is admit(security, envelope(3), job)


def test_new_limits_and_new_code_are_seen_at_once() -> None:
    job = registration(timeout=60)
    assert admit(SecurityConfig(max_timeout_s=10), envelope(), job).options.timeout == 10
    assert admit(SecurityConfig(max_timeout_s=20), envelope(), job).options.timeout == 20
    assert admit(SecurityConfig(max_timeout_s=20), envelope(), registration(timeout=5)).options.timeout == 5


def test_priorities_out_of_range_do_not_fill_memory() -> None:
    job = registration()
    for priority in range(-1000, 1000):
        admit(UNLIMITED, envelope(priority), job)
    assert len(module._known["work"][2]) == 201


# -- dispatch and --check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 600}, "job 'work': timeout 600 is over limits.timeout 300; lower it or raise the limit"),
        ({"timeout": 0.0}, "job 'work': timeout 0 (no limit) is over limits.timeout 300; lower it or raise the limit"),
        ({"max_memory": 1000000}, "job 'work': max_memory 1000000 is over limits.memory 512; lower it or raise the limit"),
        ({"priority": 500}, "job 'work': priority 500 is not within -100 to 100"),
    ],
)
def test_strict_dispatch_refuses_what_exceeds_a_limit(options: dict[str, Any], message: str) -> None:
    asked = JobOptions()._replace(**options)
    strict = SecurityConfig(max_timeout_s=300.0)
    with pytest.raises(UsageError) as caught:
        check_dispatch(strict, asked, "work")
    assert str(caught.value) == message
    lenient = strict._replace(strict=False)
    assert check_dispatch(lenient, asked, "work") == admit(lenient, envelope(), registration(**options))[1]._replace(
        priority=min(asked.priority, 100)
    )


def test_dispatch_within_the_limits_passes_unchanged() -> None:
    options = JobOptions(timeout=300, max_memory=512)
    assert check_dispatch(SecurityConfig(max_timeout_s=300), options, "work") is options
    assert check_dispatch(UNLIMITED, JobOptions(timeout=0, max_memory=10**6), "work") == JobOptions(0, 10**6)


# -- where modules lie ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """/Jobs is allowed; /JobsEvil and /elsewhere are not."""
    for name in ("Jobs/sub", "JobsEvil", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("Jobs/good.py", "Jobs/sub/deep.py", "JobsEvil/evil.py", "elsewhere/other.py"):
        (tmp_path / name).touch()
    (tmp_path / "Jobs/link.py").symlink_to(tmp_path / "elsewhere/other.py")
    (tmp_path / "Jobs/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back.py").symlink_to(tmp_path / "Jobs/good.py")
    (tmp_path / "JobsLink").symlink_to(tmp_path / "Jobs")
    return tmp_path


@pytest.mark.parametrize("allowed", ["Jobs", "Jobs/", "JobsLink", "elsewhere/../Jobs", "."])
@pytest.mark.parametrize(
    "file", ["Jobs/good.py", "Jobs/sub/deep.py", "JobsLink/good.py", "elsewhere/back.py", "JobsEvil/../Jobs/good.py"]
)
def test_a_module_within_an_allowed_path_passes(tree: Path, allowed: str, file: str) -> None:
    check_module_path(SecurityConfig(allowed_paths=("/nowhere", f"{tree}/{allowed}")), "app.jobs", f"{tree}/{file}")


@pytest.mark.parametrize("allowed", ["Jobs", "Jobs/", "JobsLink"])
@pytest.mark.parametrize(
    ("file", "real"),
    [
        ("JobsEvil/evil.py", "JobsEvil/evil.py"),  # begins with the text of the allowed path
        ("Jobs/../JobsEvil/evil.py", "JobsEvil/evil.py"),
        ("Jobs/link.py", "elsewhere/other.py"),
        ("Jobs/linked/other.py", "elsewhere/other.py"),
        ("elsewhere/other.py", "elsewhere/other.py"),
        ("Jobs.py", "Jobs.py"),
    ],
)
def test_a_module_outside_is_refused_by_its_real_path(tree: Path, allowed: str, file: str, real: str) -> None:
    with pytest.raises(Refused) as caught:
        check_module_path(SecurityConfig(allowed_paths=(f"{tree}/{allowed}",)), "app.jobs", f"{tree}/{file}")
    assert str(caught.value) == (
        f"module 'app.jobs' lies in {os.path.realpath(tree)}/{real}, which is not within security.allowed_paths "
        f"({tree}/{allowed}); move it there, or add its directory"
    )


def test_a_file_may_be_allowed_by_itself(tree: Path) -> None:
    security = SecurityConfig(allowed_paths=(f"{tree}/Jobs/good.py",))
    check_module_path(security, "good", f"{tree}/Jobs/good.py")
    with pytest.raises(Refused):
        check_module_path(security, "deep", f"{tree}/Jobs/sub/deep.py")


def test_without_allowed_paths_anything_passes_and_with_none_of_them_nothing() -> None:
    check_module_path(SecurityConfig(), "x", "/anywhere.py")
    check_module_path(SecurityConfig(), "x", None)
    with pytest.raises(Refused, match=r"not within security\.allowed_paths \(empty: nothing is\)"):
        check_module_path(SecurityConfig(allowed_paths=()), "x", "/anywhere.py")
    with pytest.raises(Refused, match=r"module 'x' is in no file, which is not within"):
        check_module_path(SecurityConfig(allowed_paths=("/",)), "x", None)


# -- where handlers lie -----------------------------------------------------------------------------------------------------

HERE = SecurityConfig(allowed_paths=(os.path.dirname(__file__),))


def outside_decorator(function: Any) -> Any:
    """As a library's decorator: its wrapper's code lies elsewhere."""
    code = compile("def wrapper(*args):\n    return 1\n", shutil.__file__, "exec")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return functools.wraps(function)(namespace["wrapper"])


class Job:
    def handle(self) -> None: ...


class Inherited(Job): ...


class Borrowed:
    handle = shutil.rmtree


def loop_of_wrappers() -> None: ...


loop_of_wrappers.__wrapped__ = loop_of_wrappers  # type: ignore[attr-defined]  # functions take any attribute
made_by_exec: dict[str, Any] = {}
exec("def handler(): pass", made_by_exec)


@pytest.mark.parametrize(
    "target",
    [
        work,
        Job,
        Inherited,
        functools.partial(work),
        functools.partial(functools.partial(work)),
        Job().handle,
        outside_decorator(work),
    ],
    ids=["function", "class", "inherited", "partial", "partial of partial", "method", "decorated from outside"],
)
def test_a_handler_whose_code_lies_within_passes(target: Any) -> None:
    check_handler_path(HERE, registration(target))


@pytest.mark.parametrize(
    "target",
    [
        shutil.rmtree,
        functools.partial(shutil.rmtree, "/"),
        functools.wraps(shutil.rmtree)(lambda *args: shutil.rmtree(*args)),
        Borrowed,
        types.MethodType(shutil.rmtree, "/"),
        os.remove,
        made_by_exec["handler"],
        loop_of_wrappers,
    ],
    ids=["function", "partial", "wrapped", "class", "method", "builtin", "exec", "endless"],
)
def test_a_handler_whose_code_lies_outside_is_refused(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.path.dirname(__file__))  # "<string>" must not count as a file here
    with pytest.raises(Refused, match=r"^job 'work' of module '\S+' (lies in /.*shutil\.py|is in no file), which is not within"):
        check_handler_path(HERE, registration(target))
    check_handler_path(SecurityConfig(), registration(target))


def test_a_job_known_from_the_manifest_has_no_code_to_check() -> None:
    check_handler_path(HERE, registration(None))


# -- finding the file of a module without running it ------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Path]:
    """Packages whose every line of code would end the test run."""
    for name in (
        "shop/jobs.py",
        "shop/__init__.py",
        "shop/inner/__init__.py",
        "shop/inner/mail.py",
        "plain.py",
        "spaced/sub/low.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('this code must not run')\n")
    before = set(sys.modules)
    yield tmp_path
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {"shop", "plain", "spaced"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("plain", "plain.py"),
        ("shop", "shop/__init__.py"),
        ("shop.jobs", "shop/jobs.py"),
        ("shop.inner", "shop/inner/__init__.py"),
        ("shop.inner.mail", "shop/inner/mail.py"),
        ("spaced.sub.low", "spaced/sub/low.py"),  # two namespace packages deep
        ("spaced.sub", None),  # a namespace package has no file
        ("shop.none", None),
        ("none.jobs", None),
        ("plain.jobs", None),
        ("time", None),  # built in, wherever a file of that name lies
        ("", None),
        ("shop.", None),
        (".shop", None),
        ("shop/jobs", None),
    ],
)
def test_a_module_is_found_without_running_it(sources: Path, name: str, file: str | None) -> None:
    assert find_module_file(name, [str(sources)]) == (None if file is None else f"{sources}/{file}")


def test_search_paths_come_before_installed_modules(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        directory.mkdir()
        (directory / "colorsys.py").touch()
    assert find_module_file("colorsys", [str(first), str(second)]) == f"{first}/colorsys.py"
    assert find_module_file("colorsys", []) == importlib.import_module("colorsys").__file__
    assert find_module_file("json.decoder", []) == importlib.import_module("json.decoder").__file__


def test_a_finder_of_an_editable_install_is_asked_too(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import ModuleSpec, PathFinder

    class Editable:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return PathFinder.find_spec(name, [str(sources)]) if name == "shop" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    assert find_module_file("shop.inner.mail", []) == f"{sources}/shop/inner/mail.py"

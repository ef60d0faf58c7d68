"""kqueue.yaml: what it means, and that whatever is wrong with it is said in one line that names the place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kqueue.codec import MAX_BYTES
from kqueue.config import Config, QueueSpec
from kqueue.config_file import load_config, make_config
from kqueue.errors import ConfigError, UsageError
from kqueue.settings import NOT_YET, SETTINGS, parse_duration, parse_size, resolve_url

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write kqueue.yaml into an empty current directory and load it by that relative name."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str | bytes, **environ: str) -> Config:
        (tmp_path / "kqueue.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return load_config("kqueue.yaml", environ)

    return write_and_load


def refusal(load: Load, text: str | bytes, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, **environ)
    assert "\n" not in str(caught.value), "a message is one line"
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- what a file means ------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(load: Load, tmp_path: Path) -> None:
    config = load("")
    assert config == load("# only a comment\n---\n")
    assert config.file == str(tmp_path / "kqueue.yaml")
    assert config.instance == "main"
    assert config.state_dir == str(tmp_path / "var")
    assert config.queue.url == f"sqlite:///{tmp_path}/var/kqueue.db"
    assert config.queue.names == (QueueSpec("default", 1, 0, 0),)
    assert not config.queue.strict_order
    assert config.queue.lease_s == 15
    assert config.queue.dead == (0, 0)
    assert config.jobs.path == (str(tmp_path),)
    assert config.jobs.modules == config.jobs.isolated_modules == ()
    assert config.inline == (10000, 0.1, 5)
    assert config.isolated == (4, "fork", "80%", 2, True, *(None,) * 4, 0, (), False, True, 128)
    assert config.pool == (2, 1000, 256, 3600)
    assert config.limits == (0, 512, 0, 0, 0, 0, 0, 0, 0, MAX_BYTES)
    assert config.security == (None, None, None, True)
    assert config.runtime == (512, 5)
    assert config.shutdown.grace_s == 20
    assert config.log == ("info", "auto")
    assert config.control == (str(tmp_path / "var/kqueued.sock"), 0o600)


def test_the_sample_of_the_design(load: Load, tmp_path: Path) -> None:
    config = load("""
instance: main
state_dir: var
queue:
  url: sqlite:///var/kqueue.db
  names: {default: 1, mail: 3}
  lease: 15s
  sync_replicas: 0
jobs:
  path: [.]
  modules: [app.jobs]
  isolated_modules: [app.heavy]
  unknown: retry
inline:   {max_concurrent: 10000, max_slice: 100ms, hard_slice: 5s}
isolated: {max_concurrent: 4, start: fork, memory_budget: 80%, kill_grace: 2s, user: null}
pool:     {size: 2, max_jobs: 1000, max_memory: 256}
limits:   {timeout: 0, memory: 512, concurrent: 0, per_minute: 0}
security: {allowed_paths: [./app], signing_key_file: null, strict: true}
runtime:  {memory_limit: 512, memory_check: 5s}
shutdown: {grace: 20s}
log:      {level: info, format: auto}
control:  {socket: var/kqueued.sock, mode: "0600"}
""")
    assert config.queue.names == (QueueSpec("default"), QueueSpec("mail", weight=3))
    assert config.jobs.modules == ("app.jobs",)
    assert config.jobs.isolated_modules == ("app.heavy",)
    assert config.security.allowed_paths == (str(tmp_path / "app"),)
    sampled = {"jobs": config.jobs, "security": config.security, "queue": config.queue, "lines": config.lines}
    assert config == load("")._replace(**sampled)


def test_a_list_of_queues_is_strict_order(load: Load) -> None:
    queue = load("queue: {names: [mail, default]}").queue
    assert queue.strict_order
    assert [spec.name for spec in queue.names] == ["mail", "default"]


def test_a_queue_may_have_limits_of_its_own(load: Load) -> None:
    queue = load("queue: {names: {a: {weight: 3, max_concurrent: 50, per_minute: 600}, b: {}, c: 2}}").queue
    assert queue.names == (QueueSpec("a", 3, 50, 600), QueueSpec("b", 1, 0, 0), QueueSpec("c", 2, 0, 0))


def test_a_section_whose_lines_are_commented_out_keeps_its_defaults(load: Load) -> None:
    assert load("limits:\n  # memory: 64\nlog:\n").limits.memory_mib == 512


def test_no_allowed_paths_and_an_empty_list_of_them_differ(load: Load) -> None:
    assert load("security: {allowed_paths: null}").security.allowed_paths is None
    assert load("security: {allowed_paths: []}").security.allowed_paths == ()


def test_a_byte_order_mark_and_a_date_for_a_name_do_no_harm(load: Load) -> None:
    assert load(b"\xef\xbb\xbfinstance: 2026-11-24\n").instance == "2026-11-24"


def test_keys_are_the_text_that_was_typed(load: Load) -> None:
    assert [spec.name for spec in load("queue: {names: {on: 1, 5: 2}}").queue.names] == ["on", "5"]


@pytest.mark.parametrize("mode", ["0660", "660"])
def test_the_socket_mode_is_octal(load: Load, mode: str) -> None:
    assert load(f'control: {{mode: "{mode}"}}').control.mode == 0o660


@pytest.mark.parametrize("budget", ["1%", "100%", "4GiB", "4096"])
def test_the_memory_budget_is_kept_as_written(load: Load, budget: str) -> None:
    assert load(f"isolated: {{memory_budget: {budget}}}").isolated.memory_budget == budget


def test_sizes_of_settings_become_whole_mib_rounded_down(load: Load) -> None:
    assert load("limits: {memory: 512MB, envelope: 64KiB}").limits == (0, 488, 0, 0, 0, 0, 0, 0, 0, 64 * 1024)
    assert load("runtime: {memory_limit: 2GiB}").runtime.memory_limit_mib == 2048


# -- paths ------------------------------------------------------------------------------------------------------------------

PATHS = """
state_dir: state
jobs: {path: [src, /opt/lib, ..]}
security: {allowed_paths: [src/app]}
control: {socket: run/k.sock}
queue: {url: "sqlite:///data/q 100%.db"}
"""


def test_relative_paths_start_at_the_file_not_at_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/kqueue.yaml").write_text(PATHS)
    monkeypatch.chdir(tmp_path)
    config = load_config("etc/kqueue.yaml")
    etc = f"{tmp_path}/etc"
    assert config.state_dir == f"{etc}/state"
    assert config.jobs.path == (f"{etc}/src", "/opt/lib", str(tmp_path))
    assert config.security.allowed_paths == (f"{etc}/src/app",)
    assert config.control.socket == f"{etc}/run/k.sock"
    assert config.queue.url == f"sqlite:///{etc}/data/q 100%.db"
    assert config.file == f"{etc}/kqueue.yaml"
    assert config.shown_file == "etc/kqueue.yaml"


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("sqlite:///x.db", "sqlite:////here/x.db"),
        ("sqlite:///../x.db", "sqlite:////x.db"),
        ("sqlite:////var/x.db", "sqlite:////var/x.db"),
        ("memory://", "memory://"),
        ("redis://localhost", "redis://localhost"),
        ("redis://u:p%40ss@[::1]:6379/3?x=1", "redis://u:p%40ss@[::1]:6379/3?x=1"),
        ("rediss://h:1/0", "rediss://h:1/0"),
        ("redis://h:1,[::1]:2/0", "redis://h:1,[::1]:2/0"),
        ("redis+sentinel://a:1,b/main/2?sentinel_password=x", "redis+sentinel://a:1,b/main/2?sentinel_password=x"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix://u:p%40ss@/run/redis.sock?db=4", "unix://u:p%40ss@/run/redis.sock?db=4"),
    ],
)
def test_urls(url: str, resolved: str) -> None:
    assert resolve_url(url, "/here") == resolved


def test_a_relative_sqlite_path_needs_a_file_it_is_relative_to() -> None:
    with pytest.raises(UsageError, match=r"write it absolute: sqlite:////path"):
        resolve_url("sqlite:///x.db", None)
    assert resolve_url("sqlite:////x.db", None) == "sqlite:////x.db"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("var/secret.db", "queue.url: it has no scheme"),
        ("redsi://:secret@h", "'redsi' is no known scheme (did you mean \"redis\"?); known are sqlite, redis, rediss, unix"),
        ("ftp://:secret@h", "'ftp' is no known scheme; known are"),
        ("postgresql://:secret@h/db", "postgresql:// is not supported by this version; use sqlite, redis, rediss, unix, redis+"),
        ("redis+sentinel://:secret@h", "after the Sentinels stand the name of their service"),
        ("redis+sentinel://:secret@h/main/db", "after the Sentinels stand the name of their service"),
        ("redis+sentinel://h:1,g:secret/main", "its host and port cannot be read"),
        ("sqs://eu-west-1/secret", "sqs:// is not supported by this version"),
        ("sqlite://secret.db", "takes three slashes before a relative path"),
        ("sqlite://", "takes three slashes"),
        ("sqlite:///secret.db?timeout=5", "sqlite:// takes no options after a ?"),
        ("sqlite:///", "names no file; for a queue in memory write memory://"),
        ("sqlite:///:memory:", "names no file"),
        ("redis://h:secret/0", "its host and port cannot be read; percent-encode"),
        ("redis://:se/cret@h", "its host and port cannot be read; percent-encode"),
        ("redis://h/secret", "the number of the database"),
        ("redis://h/?db=secret", "the number of the database"),
        ("unix://secret/redis.sock", "a Unix socket takes three slashes, and an absolute path"),
        ("unix://", "a Unix socket takes three slashes, and an absolute path"),
        ("unix:///run/redis.sock?db=secret", "the number of the database"),
    ],
)
def test_urls_that_are_refused_without_repeating_a_secret(load: Load, url: str, message: str) -> None:
    said = refusal(load, f'queue:\n  url: "{url}"\n')
    assert said.startswith("kqueue.yaml:2: queue.url: ")
    assert message in said
    assert "secret" not in said


# -- the environment, and secrets in files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "instance"),
    [
        ("${NAME}", "web"),
        ("a-${NAME}-${NAME}", "a-web-web"),
        ("${NAME:-other}", "web"),
        ("${UNSET:-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("'${NAME}'", "web"),
        ("${NUMBER}", "17"),
    ],
)
def test_environment(load: Load, written: str, instance: str) -> None:
    assert load(f"instance: {written}", NAME="web", EMPTY="", NUMBER="17").instance == instance


def test_the_environment_may_hold_numbers_and_switches(load: Load) -> None:
    text = 'isolated:\n  max_concurrent: ${N}\n  kill_grace: ${S}\nsecurity: {strict: "${B:-no}"}\nlimits: {memory: "${N}"}'
    config = load(text, N="7", S="3s")
    assert config.isolated.max_concurrent == 7
    assert config.isolated.kill_grace_s == 3
    assert config.security.strict is False
    assert config.limits.memory_mib == 7


def test_environment_in_lists_and_urls_but_never_in_keys(load: Load) -> None:
    config = load('jobs: {modules: ["${APP}.jobs"]}\nqueue:\n  url: redis://:${PW}@h\n', APP="shop", PW="x")
    assert config.jobs.modules == ("shop.jobs",)
    assert config.queue.url == "redis://:x@h"
    assert 'unknown setting "${APP}"' in refusal(load, "${APP}: 1", APP="instance")


def test_a_literal_reference(load: Load) -> None:
    assert load("state_dir: /$${X}$Y$").state_dir == "/${X}$Y$"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("${UNSET}", "${UNSET} is not set in the environment; set it, or write ${UNSET:-default}"),
        ("${1X}", "'${1X}' is no reference; write ${NAME}, ${NAME:-default}, or $${ for a literal ${"),
        ("${}", "'${}' is no reference"),
        ("${NAME-x}", "'${NAME-x}' is no reference"),
        ("a${NAME", "'${NAME' is no reference"),
        ("${EMPTY}", "instance must be 1 to 64 letters, digits and _ . -, not ''"),
    ],
)
def test_references_that_are_refused(load: Load, written: str, message: str) -> None:
    said = refusal(load, f"\ninstance: {written}", EMPTY="", NAME="web")
    assert said.startswith("kqueue.yaml:2: instance")
    assert message in said


def test_replicas_that_must_have_a_write_travel_in_the_url(load: Load) -> None:
    assert load('queue: {url: "redis://h:1/0", sync_replicas: 2}').queue.url == "redis://h:1/0?sync_replicas=2"
    assert load('queue: {url: "unix:///r.sock?db=1", sync_replicas: 2}').queue.url == "unix:///r.sock?db=1&sync_replicas=2"
    assert load('queue: {url: "redis://h:1/0", sync_replicas: 0}').queue.url == "redis://h:1/0"


def test_the_url_from_a_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://:p@h:6379/1\r\n")
    assert load("queue: {url_file: url}").queue.url == "redis://:p@h:6379/1"
    (tmp_path / "url").write_text("sqlite:///q.db")
    assert load("queue: {url_file: url}").queue.url == f"sqlite:///{tmp_path}/q.db"


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://h:6379/0", "redis://:a%2Fb%40%20c%3A@h:6379/0"),
        ("redis://user@h", "redis://user:a%2Fb%40%20c%3A@h"),
        ("rediss://user:@h/1?x=y@z", "rediss://user:a%2Fb%40%20c%3A@h/1?x=y@z"),
        ("redis+sentinel://a:1,b:2/main", "redis+sentinel://:a%2Fb%40%20c%3A@a:1,b:2/main"),
        ("unix:///run/r.sock?db=1", "unix://:a%2Fb%40%20c%3A@/run/r.sock?db=1"),
    ],
)
def test_the_password_from_a_file(load: Load, tmp_path: Path, url: str, whole: str) -> None:
    (tmp_path / "password").write_text("a/b@ c:\n")
    assert load(f"queue:\n  url: {url}\n  password_file: ${{DIR}}/password", DIR=str(tmp_path)).queue.url == whole


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        ("  url: memory://\n  url_file: one\n", "3: queue.url and queue.url_file are both set; keep one"),
        ("  url_file: one\n  url: memory://\n", "2: queue.url and queue.url_file are both set; keep one"),
        ("  url_file: gone\n", "2: queue.url_file: {dir}/gone cannot be read: No such file or directory"),
        ("  url_file: .\n", "2: queue.url_file: {dir}/. cannot be read: Is a directory"),
        ("  url_file: empty\n", "2: queue.url_file: {dir}/empty must hold one line, the secret"),
        ("  url_file: lines\n", "2: queue.url_file: {dir}/lines must hold one line, the secret"),
        ("  url_file: latin\n", "2: queue.url_file: {dir}/latin cannot be read: it is not UTF-8"),
        ("  url_file: one\n", "2: queue.url_file: it has no scheme"),
        ("  url_file: 5\n", "2: queue.url_file must be a path, not 5"),
        ("  url: redis://h\n  password_file: gone\n", "3: queue.password_file: {dir}/gone cannot be read"),
        ("  url: redis://:old@h\n  password_file: one\n", "3: queue.password_file: the URL has a password already; keep one"),
        ("  url: memory://\n  password_file: one\n", "3: queue.password_file: a memory:// queue takes no password; remove it"),
    ],
)
def test_secrets_that_cannot_be_used(load: Load, tmp_path: Path, queue: str, message: str) -> None:
    for name, content in {"one": b"s3cret\n", "empty": b"\n", "lines": b"a\nb\n", "latin": b"\xe9"}.items():
        (tmp_path / name).write_bytes(content)
    said = refusal(load, "queue:\n" + queue)
    assert said.startswith("kqueue.yaml:" + message.format(dir=tmp_path).replace("/.", ""))
    assert "s3cret" not in said


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys, at every level
        ("instence: a", '1: unknown setting "instence" (did you mean "instance"?); allowed here: instance, state_dir, queue, '),
        ("\nqueue:\n  leese: 5s", '3: unknown setting "queue.leese" (did you mean "lease"?); allowed here: url, url_file, '),
        ("queue: {names: {a: {wieght: 1}}}", '1: unknown setting "queue.names.a.wieght" (did you mean "weight"?); allowed here'),
        ("grace: 5s", '1: unknown setting "grace" (did you mean "shutdown.grace"?)'),
        ("queue.lease: 5s", '1: unknown setting "queue.lease"'),
        ("schedule: []", '1: unknown setting "schedule"'),
        ("queue: {dead: {max_ages: 5d}}", '1: unknown setting "queue.dead.max_ages" (did you mean "max_age"?); allowed here: '),
        ("queue: {dead.max_age: 5d}", '1: unknown setting "queue.dead.max_age"'),
        ("queue: {dead: 30d}", '1: queue.dead must be a mapping of settings, not \'30d\''),
        ("5: a", '1: unknown setting "5"'),
        ("<<: {instance: a}", '1: unknown setting "<<"'),
        # the same key twice
        ("a: 1\nlog:\n  level: info\n  format: json\n  level: error", '5: "log.level" is set twice, first on line 3; keep one'),
        ("instance: a\n\ninstance: b", '3: "instance" is set twice, first on line 1; keep one'),
        ("queue:\n  names:\n    a: 1\n    a: 2", '4: "queue.names.a" is set twice, first on line 3; keep one'),
        # sections
        ("- a", "1: the file must be a mapping such as queue: {…}, not a list"),
        ("# one\n\nhello", "3: the file must be a mapping such as queue: {…}, not 'hello'"),
        ("log: info", "1: log must be a mapping of settings, not 'info'"),
        ("\nlog: [level]", "2: log must be a mapping of settings, not a list"),
        # texts
        ("instance: 5", "1: instance must be 1 to 64 letters, digits and _ . -, not 5: put quotes around it"),
        ("instance: no", "1: instance must be 1 to 64 letters, digits and _ . -, not false: put quotes around it"),
        ("instance:", "1: instance must be 1 to 64 letters, digits and _ . -, not null"),
        ("instance: a b", "1: instance must be 1 to 64 letters, digits and _ . -, not 'a b'"),
        ("instance: {a: b}", "1: instance must be 1 to 64 letters, digits and _ . -, not a mapping"),
        ("state_dir: ''", "1: state_dir must be a path, not ''"),
        ("state_dir: 7", "1: state_dir must be a path, not 7"),
        ("queue: {url: 5}", "1: queue.url: write sqlite:///path"),
        ("log: {level: warn}", "1: log.level must be debug, info, warning or error, not 'warn': did you mean \"warning\"?"),
        ("log: {level: [info]}", "1: log.level must be debug, info, warning or error, not a list"),
        ("log: {format: xml}", "1: log.format must be auto, plain, logfmt, journald or json, not 'xml'"),
        ("jobs: {unknown: ignore}", "1: jobs.unknown must be retry or bury, not 'ignore'"),
        # lists
        ("jobs:\n  modules: app.jobs", "2: jobs.modules must be a list, not 'app.jobs': write [a, b]"),
        ("jobs:\n  path: null", "2: jobs.path must be a list, not null"),
        ("jobs:\n  modules:\n  - a\n  - b/c.py", "4: jobs.modules.1 must be a dotted module name such as app.jobs, not 'b/c.py'"),
        ("jobs:\n  modules:\n  - .a", "3: jobs.modules.0 must be a dotted module name such as app.jobs, not '.a'"),
        ("jobs:\n  modules:\n  -", "3: jobs.modules.0 must be a dotted module name such as app.jobs, not null"),
        ("jobs:\n  path:\n  - 5", "3: jobs.path.0 must be a path, not 5"),
        ("security:\n  allowed_paths: app", "2: security.allowed_paths must be a list, or null, not 'app'"),
        ("security:\n  allowed_paths: [a, null]", "2: security.allowed_paths.1 must be a path, not null"),
        # numbers and switches
        ("inline: {max_concurrent: 0}", "1: inline.max_concurrent must be an integer of at least 1, not 0"),
        ("isolated: {max_concurrent: -1}", "1: isolated.max_concurrent must be an integer of at least 0, not -1"),
        ("isolated: {max_concurrent: 1.5}", "1: isolated.max_concurrent must be an integer of at least 0, not 1.5"),
        ("isolated: {max_concurrent: '4'}", "1: isolated.max_concurrent must be an integer of at least 0, not '4': take"),
        ("isolated: {max_concurrent: true}", "1: isolated.max_concurrent must be an integer of at least 0, not true"),
        ("limits: {per_minute: many}", "1: limits.per_minute must be an integer of at least 0, not 'many'"),
        ("pool: {size: 0}", "1: pool.size must be an integer of at least 1, not 0"),
        ("security: {strict: 1}", "1: security.strict must be true or false, not 1"),
        ("security: {strict: 'true'}", "1: security.strict must be true or false, not 'true': take the quotes away"),
        ("control: {mode: 0600}", '1: control.mode must be an octal number in quotes, not 384: put quotes around it: "0600"'),
        ("control: {mode: '0900'}", "1: control.mode must be an octal number in quotes, not '0900'"),
        ("control: {mode: '07777'}", "1: control.mode must be an octal number in quotes, not '07777'"),
        # durations and sizes
        ("queue: {lease: 2s}", "1: queue.lease must be a duration of at least 3s, not '2s'"),
        ("queue: {lease: 15 sec}", "1: queue.lease must be a duration of at least 3s, not '15 sec': write 500ms, 5s, 2m,"),
        ("queue: {lease: .inf}", "1: queue.lease must be a duration of at least 3s, not inf: write"),
        ("queue: {lease: true}", "1: queue.lease must be a duration of at least 3s, not true: write"),
        ("queue: {lease: }", "1: queue.lease must be a duration of at least 3s, not null: write"),
        ("shutdown: {grace: -1}", "1: shutdown.grace must be a duration, not -1: write 500ms"),
        ("limits: {timeout: 4000d}", "1: limits.timeout must be a duration, not '4000d': the longest is 3650d"),
        (f"limits: {{timeout: 1{'0' * 400}}}", "1: limits.timeout must be a duration, not 1000"),
        (f"limits: {{memory: 1{'0' * 400}}}", "1: limits.memory must be a size of at least 1MiB, or 0, not 1000"),
        ("inline: {max_slice: 0}", "1: inline.max_slice must be a duration of at least 1ms, not 0"),
        ("limits: {memory: 64KiB}", "1: limits.memory must be a size of at least 1MiB, or 0, not '64KiB'"),
        ("limits: {memory: 512M}", "1: limits.memory must be a size of at least 1MiB, or 0, not '512M': write 512MB"),
        ("limits: {memory: 9999999999999}", "1: limits.memory must be a size of at least 1MiB, or 0, not 9999999999999: the"),
        ("limits: {envelope: 0}", "1: limits.envelope must be a size of at least 1KiB, not 0"),
        ("isolated: {memory_budget: 120%}", "1: isolated.memory_budget must be a percentage or a size, not '120%': write 512MB"),
        ("isolated: {memory_budget: 0%}", "1: isolated.memory_budget must be a percentage or a size, not '0%'"),
        ("isolated: {memory_budget: 0}", "1: isolated.memory_budget must be a percentage or a size, not 0"),
        # queues
        ("queue:\n  names: {}", "2: queue.names must be a mapping of queues to weights"),
        ("queue:\n  names: []", "2: queue.names must be a mapping of queues to weights"),
        ("queue:\n  names: mail", "2: queue.names must be a mapping of queues to weights"),
        ("queue:\n  names:\n    a: 1\n    b: 0", "4: queue.names.b must be a weight of at least 1, or a mapping, not 0"),
        ("queue:\n  names:\n    a: heavy", "3: queue.names.a must be a weight of at least 1, or a mapping, not 'heavy'"),
        ("queue:\n  names:\n    a: {weight: 0}", "3: queue.names.a.weight must be an integer of at least 1, not 0"),
        ("queue:\n  names:\n    - a\n    - b c", "4: queue.names.1 must be 1 to 64 letters, digits and _ . : -, not 'b c'"),
        ("queue:\n  names:\n    'b{c}': 1", "3: queue.names.b{c} must be 1 to 64 letters, digits and _ . : -, not 'b{c}'"),
        ("queue:\n  names:\n    - a\n    - b\n    - a", "5: queue.names lists 'a' twice; keep one"),
        ("queue:\n  names:\n    - 5", "3: queue.names.0 must be 1 to 64 letters, digits and _ . : -, not 5: put quotes"),
        # what this version does not have
        ("queue: {sync_replicas: 1}", "1: queue.sync_replicas: a sqlite:// queue has no replicas; leave it at 0"),
        ("queue:\n  url: redis://h?sync_replicas=1\n  sync_replicas: 1", "3: queue.sync_replicas: the URL says"),
        ("isolated: {start: spawn}", "1: isolated.start must be fork, pool or exec, not 'spawn'"),
        ("isolated: {user: 33}", "1: isolated.user must be the name of a user, not 33: put quotes around it"),
        ("isolated: {group: 'a b'}", "1: isolated.group must be the name of a group, not 'a b'"),
        ("isolated: {umask: 22}", '1: isolated.umask must be an octal number in quotes, not 22: put quotes around it'),
        ("isolated: {nice: -1}", "1: isolated.nice must be an integer from 0 to 19, not -1"),
        ("isolated: {environment: [A=1]}", "1: isolated.environment.0 must be a name or a pattern such as APP_*, not 'A=1'"),
        ("isolated: {environment: [KQUEUE_URL]}", "1: isolated.environment.0 must be a name or a pattern such as"),
        ("isolated: {environment: HOME}", "1: isolated.environment must be a list, not 'HOME': write [a, b]"),
        ("security: {signing_key_file: [k]}", "1: security.signing_key_file must be a path, not a list"),
        # settings against each other
        ("inline:\n  max_slice: 9s", "1: inline.hard_slice must not be shorter than inline.max_slice"),
        ("inline:\n  max_slice: 9s\n  hard_slice: 8s", "3: inline.hard_slice must not be shorter than inline.max_slice"),
    ],
)
def test_what_is_refused_names_the_line_and_what_is_allowed(load: Load, text: str, message: str) -> None:
    assert refusal(load, text).startswith(f"kqueue.yaml:{message}")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nlog: {level: info\n", 3, "not valid YAML: did not find expected ',' or '}' (while parsing a flow mapping)"),
        ("log:\n\tlevel: info\n", 2, "; indent with spaces, not tabs"),
        ("log: info\n  level: info\n", 2, "not valid YAML: mapping values are not allowed in this context"),
        ("log:\n  level: 'info\n", 3, "not valid YAML: found unexpected end of stream"),
        ("log: {level: ${LEVEL}}\n", 1, '; between { } or [ ] put quotes around it: "${…}"'),
        ("instance: a\n---\ninstance: b\n", 2, "not valid YAML: but found another document"),
        ("instance: *b\n", 1, "not valid YAML: found undefined alias"),
        ("\ninstance: a\x01b\n", 2, "it holds the character U+0001, which YAML forbids"),
        ("# é\n\ninstance: a\x01b\n", 3, "it holds the character U+0001, which YAML forbids"),
        (b"log:\n  level: \xff\n", 2, "it is not UTF-8 text"),
        ("? [a]\n: 1\n", 1, "a key must be a name"),
        ("log: {? {a: b} : c}\n", 1, "a key must be a name"),
        ("\ninstance: !!python/object/apply:os.getcwd []\n", 2, "has the tag tag:yaml.org,2002:python/object/apply:os.getcwd;"),
        ("instance: !secret x\n", 1, "instance has the tag !secret; write plain values, without tags"),
        ("queue: !!map [a]\n", 1, "queue has the tag tag:yaml.org,2002:map; write plain values, without tags"),
        ("queue: !!seq {a: b}\n", 1, "queue has the tag tag:yaml.org,2002:seq; write plain values"),
        ("queue: !!str [a]\n", 1, "queue has the tag tag:yaml.org,2002:str; write plain values"),
        ("!x {instance: a}\n", 1, "the file has the tag !x"),
        ("limits: {concurrent: !!int ''}\n", 1, "limits.concurrent: '' is not int"),
        ("limits: {concurrent: !!int x}\n", 1, "limits.concurrent: 'x' is not int"),
        ("security: {strict: !!bool x}\n", 1, "security.strict: 'x' is not bool"),
        ("\njobs: &a\n  path: *a\n", 2, "jobs is nested too deeply"),
        ("\njobs: [[[[[[[[[1]]]]]]]]]\n", 2, "jobs is nested too deeply"),
    ],
)
def test_what_is_no_yaml_or_too_much_of_it(load: Load, text: str | bytes, line: int, message: str) -> None:
    said = refusal(load, text)
    assert said.startswith(f"kqueue.yaml:{line}: ")
    assert message in said


def test_the_first_of_several_errors_is_the_one_reported(load: Load) -> None:
    text = "runtime:\n  memory_check: soon\nnonsense: 1\ninstance: 5\n"
    assert refusal(load, text).startswith("kqueue.yaml:2: runtime.memory_check")
    text = "queue:\n  names: {a: 0}\n  url: no\nisolated: {user: me}\n"
    assert refusal(load, text).startswith("kqueue.yaml:2: queue.names.a")


def test_without_libyaml_the_same_lines_are_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.delattr(yaml, "CSafeLoader")
    assert load("log: {level: error}").log.level == "error"
    assert refusal(load, "a: 1\nlog: {level: [info\n").startswith("kqueue.yaml:3: not valid YAML")
    assert refusal(load, "# é\ninstance: a\x01\n").startswith("kqueue.yaml:2: it holds the character U+0001")
    assert refusal(load, "log:\n  leevl: info\n").startswith('kqueue.yaml:2: unknown setting "log.leevl"')
    assert refusal(load, "[" * 5000).startswith("kqueue.yaml: it is nested too deeply")


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r'^gone/k\.yaml: there is no such file; "kqueue init" writes one, -c names another$'):
        load_config("gone/k.yaml")
    with pytest.raises(ConfigError, match=r"^\.: it cannot be read: Is a directory$"):
        load_config(".")
    with pytest.raises(ConfigError, match=r"it cannot be read: embedded null byte$"):
        load_config("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "kqueue.yaml"
    path.touch(mode=0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_config(str(path))


def test_every_setting_of_a_feature_to_come_can_be_left_at_its_default(load: Load) -> None:
    defaults = {setting.key: setting.default for setting in SETTINGS}
    for key in NOT_YET:
        section, leaf = key.split(".")
        load(f"{section}: {{{leaf}: {json.dumps(defaults[key])}}}")


# -- durations and sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("500ms", 0.5),
        ("5s", 5),
        ("2m", 120),
        ("1h", 3600),
        ("1d", 86400),
        ("1.5s", 1.5),
        ("5 s", 5),
        (5, 5),
        (0.25, 0.25),
        ("7", 7.0),
    ],
)
def test_durations(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize("written", ["", "s", "-5s", "5S", "5 sec", "1h30m", "1e3", "٣s", -1, True, None, [], float("nan")])
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(UsageError, match=r"write 500ms, 5s, 2m, 1h, 1d, or a number of seconds"):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (1, 2**20),
        (0.5, 2**19),
        ("64", 64 * 2**20),
        ("512MB", 512_000_000),
        ("2GB", 2_000_000_000),
        ("1TB", 10**12),
        ("1kB", 1000),
        ("1KB", 1000),
        ("64KiB", 65536),
        ("512MiB", 2**29),
        ("1.5GiB", 3 * 2**29),
        ("1TiB", 2**40),
        ("100B", 100),
        ("2 GiB", 2**31),
    ],
)
def test_sizes(written: object, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["", "MB", "512M", "512mb", "2gib", "-1MB", -1, True, None, float("inf"), "1e3", "1PB"])
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(UsageError, match=r"write 512MB, 512MiB, 2GiB, 64KiB, or a number of MiB"):
        parse_size(written)


# -- a configuration as a value ---------------------------------------------------------------------------------------------


def test_later_errors_can_name_the_line(load: Load, tmp_path: Path) -> None:
    config = load("jobs:\n  modules:\n    - app.a\n    - app.b\nqueue: {lease: 15s}\n")
    assert str(config.error("jobs.modules.1", "no such module")) == "kqueue.yaml:4: no such module"
    assert str(config.error("jobs.modules", "x")) == "kqueue.yaml:2: x"
    assert str(config.error("jobs.isolated_modules.3", "x")) == "kqueue.yaml:1: x"
    assert str(config.error("queue.url", "x")) == "kqueue.yaml:5: x"
    assert str(config.error("control.socket", "x")) == "kqueue.yaml: x"


def test_it_survives_json(load: Load) -> None:
    config = load(
        "queue: {url: 'redis://:p@h', names: {a: {per_minute: 5}, b: 2}, lease: 4.5, dead: {max_age: 30d}}\n"
        "jobs: {modules: [a.b], path: [x, y]}\n"
        "security: {allowed_paths: [x], strict: false}\n"
    )
    again = Config.from_plain(json.loads(json.dumps(config.to_plain())))
    assert again == config
    assert repr(again) == repr(config), "types, too"
    assert str(again.error("jobs.modules", "x")) == str(config.error("jobs.modules", "x"))


def test_made_in_code_it_is_checked_the_same_way(tmp_path: Path) -> None:
    config = make_config({"queue": {"url": "memory://", "names": ("a", "b")}, "jobs": {"path": (".",)}}, str(tmp_path))
    assert config.file is None
    assert config.queue.strict_order
    assert config.jobs.path == (str(tmp_path),)
    assert Config.from_plain(json.loads(json.dumps(config.to_plain()))) == config
    with pytest.raises(ConfigError, match=r"^queue\.lease must be a duration of at least 3s, not 1$"):
        make_config({"queue": {"lease": 1}})
    assert str(config.error("queue.url", "gone")) == "gone"


def test_make_config_without_values_is_the_defaults(load: Load, tmp_path: Path) -> None:
    assert make_config(directory=str(tmp_path)) == load("")._replace(file=None, shown_file=None, lines={})


def test_the_schema_and_the_records_agree() -> None:
    config = make_config()
    sections = {key: value for key, value in config._asdict().items() if hasattr(value, "_fields")}
    sections["queue.dead"] = config.queue.dead
    fields = {f"{name}.{field}" for name, record in sections.items() for field in record._fields} | {"instance", "state_dir"}
    settings = {f"{s.key.rpartition('.')[0]}.{s.field}".lstrip(".") for s in SETTINGS}
    assert settings - fields == {"queue.url_file", "queue.password_file"}
    assert fields - settings == {"queue.strict_order", "queue.dead"}


def test_importing_and_receiving_a_configuration_costs_the_supervisor_little() -> None:
    plain = json.dumps(make_config().to_plain())
    program = (
        "import json, sys; from kqueue import config, security; "
        f"config.Config.from_plain(json.loads({plain!r})); "
        "heavy = {'yaml', 'dataclasses', 'inspect', 'pathlib', 'subprocess', 'click', 'urllib.parse', 'kqueue.settings'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    # -S: site's .pth files, which an installation may have, import things of their own
    output = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, cwd=_ROOT).stdout
    assert output.strip() == "[]"


_ROOT = Path(__file__).parent.parent

"""The documentation says what the code does: settings, states, and the sample files."""

from __future__ import annotations

import configparser
import re
from functools import reduce
from pathlib import Path

import pytest
import yaml

from kqueue.config import Config
from kqueue.config_file import load_config
from kqueue.security import SecurityConfig
from kqueue.settings import COMMAND_SETTINGS, NOT_YET, QUEUE_SETTINGS, SETTINGS, Setting
from kqueue.states import TRANSITIONS, JobState

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "config/kqueue.yaml"
PRODUCTION = ROOT / "config/production.yaml"


def table(page: str, first_heading: str) -> list[list[str]]:
    """The rows of the Markdown table of docs/`page` whose first column is headed so."""
    lines = iter((ROOT / "docs" / page).read_text().splitlines())
    assert any(line.startswith(f"| {first_heading} |") for line in lines), f"docs/{page} has no table of {first_heading}"
    next(lines)  # |---|---|
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def documented() -> list[Setting]:
    """Every setting in the order of the page: those of one queue stand below queue.names, those of one command likewise."""
    settings: list[Setting] = []
    for setting in SETTINGS:
        settings.append(setting)
        if setting.key == "queue.names":
            settings += [inner._replace(key=f"queue.names.NAME.{inner.key}") for inner in QUEUE_SETTINGS]
        if setting.key == "jobs.commands":
            settings += [inner._replace(key=f"jobs.commands.NAME.{inner.key}") for inner in COMMAND_SETTINGS]
    return settings


def test_every_setting_is_documented_and_no_other() -> None:
    assert [row[0] for row in table("settings.md", "setting")] == [f"`{setting.key}`" for setting in documented()]


@pytest.mark.parametrize(("setting", "row"), list(zip(documented(), table("settings.md", "setting"), strict=False)))
def test_a_setting_is_documented_as_the_code_has_it(setting: Setting, row: list[str]) -> None:
    key, default, allowed, meaning = row
    assert key == f"`{setting.key}`"
    assert yaml.safe_load(default.strip("`")) == setting.default
    assert allowed == setting.kind.describe()
    assert meaning.endswith((".", ".**"))
    assert ("Not in this version" in meaning or "This version has" in meaning) == (setting.key in NOT_YET)


def test_the_states_are_documented_as_the_code_has_them() -> None:
    def name(state: JobState | None) -> str:
        return "—" if state is None else state.value

    assert table("states.md", "from") == [[name(before), by, name(after)] for before, by, after in TRANSITIONS]
    assert [row[0] for row in table("states.md", "state")] == [state.value for state in (*_LIVING, *_ENDED)]


_LIVING = (JobState.DELAYED, JobState.READY, JobState.LEASED)
_ENDED = (JobState.DONE, JobState.DEAD)


def test_the_sample_shows_every_setting() -> None:
    lines = load_config(str(SAMPLE), {}).lines
    text = SAMPLE.read_text()
    for setting in SETTINGS:
        shown = setting.key in lines or f"# {setting.key.rpartition('.')[2]}: " in text
        assert shown, f"config/kqueue.yaml does not show {setting.key}"
    for inner in (*QUEUE_SETTINGS, *COMMAND_SETTINGS):
        assert f"{inner.key}: " in text


def test_the_sample_is_the_defaults_but_for_what_it_names_in_brackets() -> None:
    sample = yaml.safe_load(SAMPLE.read_text())
    brackets = dict(re.findall(r"^ *(\w+): .*# \[(.*?)\] ", SAMPLE.read_text(), re.MULTILINE))
    differing = set()
    for setting in SETTINGS:
        *sections, leaf = setting.key.split(".")
        group = reduce(lambda group, section: group[section], sections, sample)
        if leaf in group and group[leaf] != setting.default:
            differing.add(leaf)
            assert yaml.safe_load(brackets[leaf]) == setting.default
    assert differing == set(brackets) == {"names", "modules", "isolated_modules", "allowed_paths"}


def test_production_is_the_preset_of_that_name() -> None:
    config = load_config(str(PRODUCTION), {})
    assert SecurityConfig.from_config(config.limits, config.security) == SecurityConfig.production(allowed_paths=("/srv/app",))
    assert config.queue.url == "sqlite:////var/lib/kqueue/kqueue.db"
    assert load_config(str(PRODUCTION), {"KQUEUE_URL": "rediss://kqueue@redis:6379/0"}).queue.url.startswith("rediss://")


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_that_is_shipped_is_valid(path: Path) -> None:
    assert isinstance(load_config(str(path), {}), Config)


def test_the_unit_waits_for_the_daemon_and_restarts_it_as_designed() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys of a unit keep their case
    unit.read(ROOT / "config/kqueued.service")
    service = unit["Service"]
    assert service["ExecStart"] == "kqueued -c /etc/kqueue/kqueue.yaml"
    assert service["Type"] == "exec", "until the daemon speaks sd_notify"
    assert service["Restart"] == "always"
    assert service["RestartPreventExitStatus"] == "2 3 4"
    assert service["KillMode"] == "mixed"
    config = load_config(str(PRODUCTION), {})
    assert int(service["TimeoutStopSec"]) > config.shutdown.grace_s + config.isolated.kill_grace_s + 5

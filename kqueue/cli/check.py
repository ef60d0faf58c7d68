"""`kqueued --check`: everything that can be known without a broker, and a table of what would run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..commands import find_program
from ..config import Config, line_of
from ..environment import withheld
from ..errors import ConfigError, UsageError
from ..events import Events
from ..execution.cgroup import guarantees
from ..execution.link import TemplateLink
from ..execution.privileges import Privileges
from ..execution.settling_in import Preparations
from ..hostmemory import budget
from ..kernel import Kernel
from ..loading import ImportFailed, import_modules, register_commands, template_config
from ..promotion import wrong_pin
from ..registry import registry
from ..security import SecurityConfig, check_dispatch
from ..signing import Keys
from ..signing import load as load_keys


def check(config: Config, warnings: Sequence[str] = ()) -> int:
    """Import what the daemon would import, in the processes that would; print, `warnings` too; 0. Raises ConfigError."""
    jobs, security = config.jobs, SecurityConfig.from_config(config.limits, config.security)
    keys = keys_of(config, security)
    privileges = Privileges.from_config(config.isolated, config.security)
    try:
        import_modules("jobs.modules", jobs.modules, jobs.path, security)
        register_commands(jobs.commands)
        template = template_config(jobs.path, jobs.modules, jobs.isolated_modules, security=security)
        if template["needed"]:
            _learn(template, privileges)
    except ImportFailed as error:
        raise config.error(error.key, str(error)) from None
    for registration in registry:
        try:
            check_dispatch(security, registration.options, registration.name)
        except UsageError as error:
            raise config.error("limits", str(error)) from None
    for name, lane in config.jobs.pin.items():
        if (why := wrong_pin(name)) is not None:
            raise config.error(f"jobs.pin.{name}", f"jobs.pin: {why}")
        registry.choose(name, lane)
    _print(config, keys)
    for warning in [*warnings, *_refusals(privileges)]:
        print(f"{config.shown_file}: warning: {warning}", file=sys.stderr)
    for command in jobs.commands:
        if find_program(command.command[0], os.environ.get("PATH")) is None:
            line = line_of(config.lines, f"jobs.commands.{command.name}.command")
            place = f"{config.shown_file}:{line}" if line else config.shown_file
            what = f"there is no program {command.command[0]!r} here; job {command.name!r} will fail"
            print(f"{place}: warning: {what}", file=sys.stderr)
    return 0


def _refusals(privileges: Privileges) -> Iterator[str]:
    """Jobs that could not run as they are declared."""
    preparations = Preparations(privileges)
    for registration in registry:
        if registration.isolated:
            by_operator = registration.parameters is not None
            asked = privileges.of_job(registration.options, registration.options.max_memory, by_operator=by_operator)
            if refusal := preparations.of(asked)[0].get("refusal"):
                yield f"job {registration.name!r} will be buried: {refusal}"


def keys_of(config: Config, security: SecurityConfig) -> Keys | None:
    """The signing keys. ConfigError, with the line, for a file that cannot be used."""
    try:
        return None if security.signing_key_file is None else load_keys(security.signing_key_file)
    except ConfigError as error:
        raise config.error("security.signing_key_file", str(error)) from None


def _learn(template: dict[str, Any], privileges: Privileges) -> None:
    kernel = Kernel()
    link = TemplateLink(kernel, Events(), privileges=privileges)
    link.configure(template)

    def look() -> Any:
        try:
            yield from link.ready()
        finally:
            yield from link.stop()

    kernel.run(look())
    kernel.close()


def _print(config: Config, keys: Keys | None) -> None:
    queues = ", ".join(
        spec.name if config.queue.strict_order else f"{spec.name} (weight {spec.weight})" for spec in config.queue.names
    )
    print(f"{config.shown_file}: ok")
    print(f"instance  {config.instance}, state in {config.state_dir}")
    print(f"queue     {_without_secret(config.queue.url)}: {queues}{' in this order' if config.queue.strict_order else ''}")
    print(f"slots     {config.inline.max_concurrent} inline, {config.isolated.max_concurrent} isolated")
    memory = budget(config.isolated.memory_budget)
    basis = f", {memory.basis}" if memory.basis.endswith(("available", "allows")) else ""
    print(f"memory    {memory.total_mib} MiB for isolated jobs{basis}")
    if config.isolated.max_concurrent:
        print(f"isolation {guarantees(config.isolated.cgroups)}")
    if keys is not None:
        signs, *others = keys.ids
        accepted = f"; also accepted: {', '.join(others)}" if others else ""
        print(f"signing   {keys.file}: signed with the key {signs}{accepted}{f' ({keys.warning})' if keys.warning else ''}")
    if names := withheld(os.environ, config.isolated.environment):
        print(f"withheld  {', '.join(names)}: isolated jobs have these only if isolated.environment names them")
    if not len(registry):
        print("jobs      none: name the modules that define them in jobs.modules or jobs.isolated_modules")
        return
    width = max(len(registration.name) for registration in registry)
    for position, registration in enumerate(registry):
        options = registration.options
        timeout = f"{options.timeout:g} s" if options.timeout else "no time-out"
        needs = f", {options.max_memory} MiB" if registration.isolated else ""
        if registration.isolated and options.max_memory > memory.total_mib:
            needs += ": over isolated.memory_budget, so it can never run here"
        label = "jobs" if position == 0 else ""
        print(f"{label:9} {registration.name:{width}}  {registration.lane:8}  {timeout}{needs}  ({registration.module})")


def _without_secret(url: str) -> str:
    """`redis://user:***@host/0`."""
    scheme, separator, rest = re.sub("(sentinel_password=)[^&]*", r"\1***", url).partition("://")
    authority, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{rest}" if not at else f"{scheme}{separator}{authority.partition(':')[0]}:***@{host}"

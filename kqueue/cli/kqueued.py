"""`kqueued`: from the command line to a running runtime, and from an error to one line and an exit code.

The supervisor stays small by not reading its own configuration: `front.py` does, in a short-lived child that imports click and
yaml, and what comes back is JSON. Meanwhile this process imports the runtime.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..errors import ConfigError, KQueueError
from ..process import keep_memory_private


def main() -> int:
    """Entry point. Returns the exit code: see INTERFACES."""
    _open_standard_fds()
    keep_memory_private()
    try:
        return _main()
    except KQueueError as error:
        print(error if isinstance(error, ConfigError) else f"kqueued: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        _report_bug()
        return 70


def _open_standard_fds() -> None:
    """Where 0, 1 or 2 was closed, the next file to be opened would get its number, and what we print would end up in it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process


def _report_bug() -> None:
    from traceback import print_exc

    print("kqueued: internal error; please report it with what follows", file=sys.stderr)
    print_exc()


def _main() -> int:
    answer = _ask_front()
    if isinstance(answer, int):
        return answer
    from ..config import Config

    config = Config.from_plain(answer["config"])
    options: dict[str, Any] = answer["options"]
    if options["check"]:
        from .check import check

        return check(config, answer["warnings"])
    return _serve(config, options, answer["warnings"])


def _ask_front() -> dict[str, Any] | int:
    """What the front child made of the command line: {"config", "options", "warnings"}; the exit code when it has said all."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        status = 70
        try:
            from .front import front

            status = front(sys.argv[1:], write_fd)
        except Exception:
            _report_bug()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write_fd)
    from ..codec import from_json
    from ..runtime import KQueueRuntime as KQueueRuntime  # while the child reads: there is a second core

    with os.fdopen(read_fd, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0 or not data:
        return status if status >= 0 else 70
    answer: dict[str, Any] = from_json(data)
    return answer


def _serve(config: Any, options: dict[str, Any], warnings: list[str]) -> int:
    """Run the daemon that `config` describes. `warnings`: what reading it gave rise to."""
    import gc
    import resource

    from ..brokers.base import Retention
    from ..control import Control
    from ..environment import withheld
    from ..events import DaemonReady, EnvironmentWithheld, IsolationKnown, Warned
    from ..execution.cgroup import guarantees
    from ..execution.privileges import Privileges
    from ..execution.workers import PoolSettings
    from ..hostmemory import budget
    from ..instance import Instance
    from ..loading import ImportFailed, import_modules, register_commands, template_config
    from ..observe.logs import Logs
    from ..observe.status import Status
    from ..observe.titles import Titles
    from ..runtime import KQueueRuntime
    from ..security import SecurityConfig
    from .check import keys_of

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # inline jobs have sockets by the thousand
    jobs, security = config.jobs, SecurityConfig.from_config(config.limits, config.security)
    keys_of(config, security)
    logs = Logs(options["log_level"] or config.log.level, config.log.format)  # first: what modules log at import goes there, too
    try:
        try:
            instance = Instance(config.state_dir, config.instance)
        except ConfigError as error:
            raise config.error("state_dir", str(error)) from None
        import_modules("jobs.modules", jobs.modules, jobs.path, security)
        register_commands(jobs.commands)
        runtime = KQueueRuntime(
            config.queue.url,
            queues=config.queue.names,
            strict_order=config.queue.strict_order,
            security=security,
            template=template_config(jobs.path, jobs.modules, jobs.isolated_modules, security=security),
            identity=instance.identity,
            slice_page=instance.slice_page,
            outbox=instance.outbox_path,
            lease_s=config.queue.lease_s,
            retention=Retention(*config.queue.dead),
            max_inline=config.inline.max_concurrent,
            max_isolated=config.isolated.max_concurrent,
            max_slice_s=config.inline.max_slice_s,
            hard_slice_s=config.inline.hard_slice_s,
            kill_grace_s=config.isolated.kill_grace_s,
            cgroups=config.isolated.cgroups,
            memory_headroom_mib=config.isolated.memory_headroom_mib,
            default_start=config.isolated.start,
            pool=PoolSettings(*config.pool),
            commands=jobs.commands,
            memory_budget=budget(config.isolated.memory_budget),
            offload_slots=config.pool.size,
            offload_memory_mib=config.pool.max_memory_mib,
            bury_unknown=jobs.unknown == "bury",
            memory_limit_mib=config.runtime.memory_limit_mib,
            heartbeat_s=config.runtime.memory_check_s,
            grace_s=config.shutdown.grace_s,
            pins=jobs.pin,
            privileges=Privileges.from_config(config.isolated, config.security),
        )
        logs.subscribe(runtime.events)
        status = Status(runtime)
        Titles(runtime, config.instance)
        control = Control(runtime, config.control.socket, config.control.mode, {"status": status.command})
        try:
            control.start()
        except ConfigError as error:
            raise config.error("control.socket", str(error)) from None
        if not runtime.broker.capabilities.durable:
            warning = f"{runtime.broker.address} keeps nothing, and no other process can dispatch to it: set queue.url"
            runtime.events.emit(Warned(warning))
        for warning in warnings:
            runtime.events.emit(Warned(warning))
        if config.isolated.max_concurrent:
            runtime.events.subscribe(
                DaemonReady, lambda fact: runtime.events.emit(IsolationKnown(guarantees(config.isolated.cgroups)))
            )
        if config.isolated.max_concurrent and (names := withheld(os.environ, config.isolated.environment)):
            runtime.events.subscribe(DaemonReady, lambda fact: runtime.events.emit(EnvironmentWithheld(names)))
        gc.freeze()  # what is here now is here to stay: no collection need look at it again
        try:
            return runtime.run(burst=options["burst"], max_jobs=options["max_jobs"], max_time_s=options["max_time"])
        finally:
            control.close()
    except ImportFailed as error:
        raise config.error(error.key, str(error)) from None


if __name__ == "__main__":
    sys.exit(main())

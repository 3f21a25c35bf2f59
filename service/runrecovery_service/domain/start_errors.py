"""The errors that end the service: it does not start, or it stops. No caller sees them.

StartRefused
├── Held, LeaseLost
├── DatabaseRefused: StoreLost, DatabaseOutOfReach
├── BackupRefused, DataDirRefused
├── ThreadsRefused, OpenFilesRefused, CgroupRefused, ContainmentRefused
├── TlsRefused, CallersRefused, WebhooksRefused, TracesRefused, PackagesMissing
└── RecoveryGaveUp, RecoveryInterrupted
"""

from __future__ import annotations

from runrecovery_service.lazy_dataclass import dataclass


class StartRefused(Exception):
    """Root of the tree. The service does not start, or it stops."""


@dataclass(eq=False)
class Held(StartRefused):
    """Another service holds the data directory, the database or the instance name."""

    what: str
    holder: str

    def __str__(self) -> str:
        return f"{self.what} is held by {self.holder}"


@dataclass(eq=False)
class DatabaseRefused(StartRefused):
    """This version must not open the database, and has changed nothing in it."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(eq=False)
class StoreLost(DatabaseRefused):
    """A file of the SQLite database was removed or replaced while the service used it."""

    copy: str | None = None

    def __str__(self) -> str:
        copy = f"a sound copy of the store is {self.copy}" if self.copy else "no copy could be made"
        return f"{super().__str__()}; {copy}"


class DatabaseOutOfReach(DatabaseRefused):
    """The database does not answer now. A later start can succeed."""


@dataclass(eq=False)
class BackupRefused(StartRefused):
    """The destination of the backup exists. Nothing was changed."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place} {self.reason}"


@dataclass(eq=False)
class DataDirRefused(StartRefused):
    """The data directory cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(eq=False)
class LeaseLost(StartRefused):
    """The lease was not renewed for so long that another service can take over soon."""

    instance: str
    seconds: float

    def __str__(self) -> str:
        return f"the lease of instance {self.instance!r} was not renewed for {self.seconds:g} s"


@dataclass(eq=False)
class ThreadsRefused(StartRefused):
    """The system refuses to start a thread for this process."""

    reason: str

    def __str__(self) -> str:
        return f"the system gives this process no more threads: {self.reason}"


@dataclass(eq=False)
class OpenFilesRefused(StartRefused):
    """The limit on open files is too low for the configuration."""

    limit: int
    needed: int
    max_concurrent: int

    def __str__(self) -> str:
        return (
            f"this process may open {self.limit} files (ulimit -n); max_concurrent ="
            f" {self.max_concurrent} needs at least {self.needed}"
        )


@dataclass(eq=False)
class RecoveryGaveUp(StartRefused):
    """Recovery failed as often as the configuration allows. No call was served."""

    tries: int
    last_error: str

    def __str__(self) -> str:
        return f"recovery failed {self.tries} times; the last error was {self.last_error}"


@dataclass(eq=False)
class CgroupRefused(StartRefused):
    """The configured cgroup cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"cgroup_parent = {self.place!r}: {self.reason}"


@dataclass(eq=False)
class ContainmentRefused(StartRefused):
    """Containment on this system is weaker than the service, or its configuration, requires."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class TlsRefused(StartRefused):
    """The files of the configured TLS cannot be used."""

    reason: str

    def __str__(self) -> str:
        return f"tls: {self.reason}"


@dataclass(eq=False)
class CallersRefused(StartRefused):
    """The tokens of the configured callers cannot be used. The text quotes no token."""

    problems: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.problems)


@dataclass(eq=False)
class WebhooksRefused(StartRefused):
    """The configured webhooks cannot be used. No text has a secret."""

    problems: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.problems)


@dataclass(eq=False)
class TracesRefused(StartRefused):
    """Traces cannot be sent with the variables of OpenTelemetry in the environment."""

    reason: str

    def __str__(self) -> str:
        return f"traces: a variable OTEL_… cannot be used: {self.reason}"


@dataclass(eq=False)
class PackagesMissing(StartRefused):
    """The configuration needs packages that are not installed."""

    problems: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.problems)


class RecoveryInterrupted(StartRefused):
    """A stop was requested during recovery. The next start continues the recovery."""

    def __str__(self) -> str:
        return "a stop was requested during recovery; the next start continues it"

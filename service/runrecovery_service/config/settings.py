"""The configuration: every key, its default and its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from runrecovery_service.config import defaults, values
from runrecovery_service.config.capacity import machine_capacity
from runrecovery_service.domain.lease import LEASE_TTL_S
from runrecovery_service.domain.run import Profile, RestartPolicy
from runrecovery_service.domain.session_check import UnknownSession
from runrecovery_service.domain.usage import MAX_BUDGET_TOKENS, MAX_BUDGET_USD
from runrecovery_service.domain.webhook import WebhookEvent
from runrecovery_service.engines.presets import Preset
from runrecovery_service.lazy_dataclass import dataclass

DEFAULT_ENV_ALLOW: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
_DAY_S: Final = 86_400.0


class LogLevel(StrEnum):
    """The lowest severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """The format of log lines. AUTO means CONSOLE on a terminal, and JSON elsewhere."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class ClientAuth(StrEnum):
    """NONE: clients need no certificate. REQUIRE: each client needs one."""

    NONE = "none"
    REQUIRE = "require"


class RoleName(StrEnum):
    """The configured name of a role. `domain/role.py` defines the rights of each role."""

    VIEWER = "viewer"
    REPLIER = "replier"
    CREATOR = "creator"
    OPERATOR = "operator"


class PermissionPolicy(StrEnum):
    """Who decides whether an agent CLI runs a tool that it calls."""

    CLI = "cli"
    """The CLI itself, by its options and settings."""
    ASK = "ask"
    """The user of the run, for the calls that `ask_for` names; the CLI itself for all others."""


class ContainmentPolicy(StrEnum):
    """What a start does if its probe cannot prove that hidden processes are found."""

    BEST_EFFORT = "best_effort"
    """Log a warning and start."""
    STRICT = "strict"
    """Refuse to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One `[engines.NAME]` table.

    Attributes:
        preset: an agent CLI: `"codex"`, `"gemini"` or `"claude"`. The service speaks the protocol
            of the CLI, and the preset sets defaults for command, profile, env_allow and trust.
            Without a preset the engine speaks the JSON-lines protocol.
        command: the words of the command, the program first; no shell reads them. A preset
            appends its own arguments.
        profile: how the runs of the engine wait for their user: `"resumable"` or
            `"sticky_process"`.
        agent_home: the folder in which the preset's CLI keeps its configuration and sessions.
            Without this key the CLI's environment variable or default sets the folder.
        trust: the CLI that trusts the workspace of each run while the run is alive: `"codex"`,
            `"gemini"`, `"claude"`, or `"none"`.
        permissions: who decides whether the CLI runs a tool. `"cli"`: the CLI, by its own options
            and settings. `"ask"`: the user, for calls that match `ask_for`; such a call ends the
            turn with a question.
        ask_for: patterns of tool calls: `"NAME"` or `"NAME(ARGUMENT)"`, with `*` for any
            characters.
        env_allow: the environment variables of the service that processes of the engine inherit.
        max_concurrent: processes of the engine at one time; without this key only the limit of
            the service applies.
        session_file: the file of a conversation, with `{workspace}` and `{value}` (the session
            handle) as placeholders. A restart checks whether this file exists.
        unknown_session: what a restart does with a run whose session it cannot check: `"keep"`
            waiting, or `"fail"` as if the session were lost.
        session_timeout_s: how long a question of a sticky process waits before the process is
            killed, and how long any question waits if `require_user_reply` is false.
        require_user_reply: if this is false, a question that waited for `session_timeout_s` is
            decided automatically, and the run continues.
        restart_policy: what a restart does with a queued or running run of the engine, unless
            CreateRun sets a policy: `"fail"`, `"requeue"` (start again from the
            beginning) or `"resume"` (the agent completes its turn in its session, and gets a
            notice of the interruption).
        max_resumes: how often one turn can be resumed after interruptions.
        resumes_interrupted: whether the engine understands a `resume` message with `interrupted`.
            With a preset the default is true.
        max_run_time_s: the time from the first launch, waits included, after which a run fails.
            Without this key a run can take any time.
        max_tokens: the tokens, of input and output together, at which a run fails.
        max_cost_usd: the cost at which a run fails, as its agent reports it.
        nice: the niceness of processes, added to that of the service.
        max_memory: private writable memory of each process (RLIMIT_DATA), in bytes or "512M".
        max_open_files: descriptors of each process (RLIMIT_NOFILE).
        max_processes: processes and threads of the service's user, counted over the whole machine
            (RLIMIT_NPROC; root is not limited).
    """

    command: Annotated[tuple[str, ...], values.command]
    profile: Annotated[Profile, values.one_of(Profile)]
    preset: Annotated[Preset | None, values.one_of(Preset)] = None
    agent_home: Annotated[str | None, values.absolute] = None
    trust: Annotated[str | None, values.trust] = None
    permissions: Annotated[PermissionPolicy, values.one_of(PermissionPolicy)] = PermissionPolicy.CLI
    ask_for: Annotated[tuple[str, ...], values.tool_patterns] = ()
    env_allow: Annotated[tuple[str, ...], values.variables] = DEFAULT_ENV_ALLOW
    max_concurrent: Annotated[int | None, values.whole(1, 10_000)] = None
    session_file: Annotated[str | None, values.session_file] = None
    unknown_session: Annotated[UnknownSession, values.one_of(UnknownSession)] = UnknownSession.KEEP
    session_timeout_s: Annotated[float, values.seconds(0.1, 365 * _DAY_S)] = 1_200.0
    require_user_reply: Annotated[bool, values.boolean] = True
    restart_policy: Annotated[RestartPolicy, values.one_of(RestartPolicy)] = RestartPolicy.FAIL
    max_resumes: Annotated[int, values.whole(1, 100)] = 3
    resumes_interrupted: Annotated[bool, values.boolean] = False
    max_run_time_s: Annotated[float | None, values.seconds(0.1, 365 * _DAY_S)] = None
    max_tokens: Annotated[int | None, values.whole(1, MAX_BUDGET_TOKENS)] = None
    max_cost_usd: Annotated[float | None, values.dollars(0, MAX_BUDGET_USD)] = None
    nice: Annotated[int, values.whole(0, 19)] = 0
    max_memory: Annotated[int | None, values.size_bytes(1024**2, 2**50)] = None
    max_open_files: Annotated[int | None, values.whole(8, 2**20)] = None
    max_processes: Annotated[int | None, values.whole(1, 2**22)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """The `[tls]` table. The files are read again when they change.

    Attributes:
        certificate: the certificate of the service in PEM, followed by the intermediate ones.
        key: the private key of the certificate in PEM, without a password.
        client_ca: the certificates in PEM that sign the certificates of clients.
        client_auth: with `"require"`, a client needs a certificate that `client_ca` has signed.
    """

    certificate: Annotated[Path, values.path]
    key: Annotated[Path, values.path]
    client_ca: Annotated[Path | None, values.path] = None
    client_auth: Annotated[ClientAuth, values.one_of(ClientAuth)] = ClientAuth.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerSettings:
    """One `[[callers]]` table. A caller is recognised by a token or by a certificate.

    Attributes:
        name: recorded with everything that the caller changes.
        role: the rights of the caller: `"viewer"`, `"replier"`, `"creator"` or `"operator"`.
        token_sha256: the SHA-256 of the token in hexadecimal, or a list of at most two, so that a
            token can be replaced.
        token_file: a file with one token, or two, each on its own line; instead of `token_sha256`.
        certificate_name: a URI or DNS name in the caller's certificate, or the common name of a
            certificate that has neither.
        engines: the engines whose runs the caller is allowed to create, see and change. Without
            this key the runs of all engines.
        max_calls: calls and streams of the caller at one time. Without this key only the limits of
            the service apply.
        max_calls_per_s: calls and streams that the caller can begin in a second. Without this key
            there is no limit.
    """

    name: Annotated[str, values.name]
    role: Annotated[RoleName, values.one_of(RoleName)]
    token_sha256: Annotated[tuple[str, ...], values.token_digests] = ()
    token_file: Annotated[Path | None, values.path] = None
    certificate_name: Annotated[str | None, values.filled] = None
    engines: Annotated[tuple[str, ...] | None, values.names] = None
    max_calls: Annotated[int | None, values.whole(1, 1_000_000)] = None
    max_calls_per_s: Annotated[int | None, values.whole(1, 1_000_000)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """The `[retention]` table: ages as text, like "30d". Data without an age is kept for ever.

    Attributes:
        ended_runs: from the end of a run until its rows and files are removed.
        max_ended_runs: the most ended runs that are kept. Beyond this number the oldest are
            removed.
        outputs: from the end of a run until its output is removed.
        workspaces: from the end of a run until its workspaces are removed.
        events: from the end of a run until its events are removed.
        receipts: from a request until its request_id is forgotten.
        reports: from a recovery until its report is removed. A report that a kept run names stays.
    """

    ended_runs: Annotated[float | None, values.age(60, 36_500 * _DAY_S)] = None
    max_ended_runs: Annotated[int | None, values.whole(0, 1_000_000_000)] = None
    outputs: Annotated[float | None, values.age(60, 36_500 * _DAY_S)] = None
    workspaces: Annotated[float | None, values.age(60, 36_500 * _DAY_S)] = None
    events: Annotated[float | None, values.age(60, 36_500 * _DAY_S)] = None
    receipts: Annotated[float | None, values.age(60, 36_500 * _DAY_S)] = None
    reports: Annotated[float | None, values.age(60, 36_500 * _DAY_S)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSettings:
    """One `[[webhooks]]` table: an address that gets events of runs.

    Attributes:
        name: the name in the log and in `runrecovery webhooks`. Waiting deliveries belong to the
            name, also after a change of the other keys.
        url: gets a POST for each event. `http://` needs `allow_private` or `insecure_http`.
        secret_file: a file with the secret on a line of its own, or with at most two secrets:
            `whsec_…`, as Standard Webhooks defines it.
        events: `"WAITING_USER"`, `"ENDED"`, `"RECOVERED"`.
        engines: the engines whose runs send events. Without this key the runs of all engines do.
        allow_private: private addresses and networks to which requests are allowed; true: all.
        insecure_http: whether plain HTTP to public addresses is allowed.
        ca_file: certificates in PEM that sign the certificate of the host. Without this key the
            service uses the certificates of the system.
        timeout_s: the time limit of one try.
        give_up_s: the age of an event after which a failed delivery is given up.
    """

    name: Annotated[str, values.name]
    url: Annotated[str, values.webhook_url] = field(repr=False)
    secret_file: Annotated[Path, values.path]
    events: Annotated[tuple[WebhookEvent, ...], values.words_of(WebhookEvent)] = tuple(WebhookEvent)
    engines: Annotated[tuple[str, ...] | None, values.names] = None
    allow_private: Annotated[tuple[values.Network, ...], values.networks] = ()
    insecure_http: Annotated[bool, values.boolean] = False
    ca_file: Annotated[Path | None, values.path] = None
    timeout_s: Annotated[float, values.seconds(0.1, 300)] = 15.0
    give_up_s: Annotated[float, values.seconds(60, 30 * _DAY_S)] = 3 * _DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """The `[traces]` table.

    Attributes:
        endpoint: the collector, which speaks OTLP over HTTP; spans go to `/v1/traces` below it.
        sample_ratio: the part of the traces that is recorded, from 0 to 1.
        sample_by_caller: a caller that sends `traceparent` decides whether its calls, and the runs
            it creates, are recorded. False: `sample_ratio` decides for every trace.
    """

    endpoint: Annotated[str, values.collector_url]
    sample_ratio: Annotated[float, values.ratio] = 1.0
    sample_by_caller: Annotated[bool, values.boolean] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole configuration. Relative paths start from the working directory.

    Attributes:
        listen: HOST:PORT (port 0: any free one), [IPV6]:PORT or unix:PATH.
        insecure_listen: whether `listen` and `http_listen` can be addresses that other machines
            reach without TLS or callers.
        probe_listen: HOST:PORT that answers health checks only, in plaintext. Empty: none.
        metrics_listen: HOST:PORT where Prometheus reads metrics, in plaintext. Empty: no metrics.
        http_listen: HOST:PORT of the contract as JSON over HTTP, and of the console. Empty: none.
        http_origins: origins whose pages are allowed to call the contract in a browser.
        http_hosts: further names under which clients can address `http_listen`, in addition to
            its own host and localhost.
        console: whether `http_listen` has pages for people.
        data_dir: the folder of outputs, workspaces, the lock, and the SQLite database unless
            `database` names another place.
        runs_dir: the folder with the folders of the runs; empty: `runs` in `data_dir`.
        database: `postgresql://…` or `sqlite:///path`; empty: SQLite in `data_dir`.
        database_direct: a `postgresql://…` URL by which the same database is reached without its
            connection pooler.
        instance: the name of this copy of the service. A start recovers the runs of this name.
        max_concurrent: the most processes at one time; 0: computed from the cores and the memory
            of the machine.
        max_queued: the most runs that wait for a slot. A further one is refused as OVERLOADED.
        max_attempts: how often a run is started from the beginning, restarts included.
        max_request_bytes: the largest request that is accepted.
        max_output_bytes: the most bytes that are kept of stdout, and of stderr, of one attempt.
        min_free_bytes: below this many free bytes on the disk, no process is launched and no run
            is created; 0: no limit.
        max_concurrent_calls: calls in progress; health checks and streams are not counted.
        max_concurrent_streams: watches and followed outputs open at one time.
        watch_stall_s: a stream is cut off if its client has read nothing for this time.
        reopen_window_s: how long a run that lost its session in a restart can be reopened; the
            store keeps its question and handle for this time.
        cancel_grace_s: seconds from SIGTERM to SIGKILL when the service ends a process: after a
            cancel, a deadline or an error of the agent, and at a stop.
        exit_grace_s: the longest time to the exit of the process, from its last line after a
            question or result, or from a closed stdout. A process that lives longer is killed.
        finish_s: at a stop, how long running turns have to end by themselves before they are
            interrupted. Nothing is launched meanwhile.
        drain_delay_s: seconds from NOT_SERVING until the service refuses calls, for load
            balancers.
        stop_grace_s: how long calls in progress have to finish at a stop.
        orphan_grace_s: seconds from SIGTERM to SIGKILL for processes of earlier epochs.
        orphan_deadline_s: the time limit to kill all processes of earlier epochs. Survivors are
            reported. A planned stop has this time after `cancel_grace_s`, for the processes of
            its own epoch.
        shared_workspaces: whether every instance on the PostgreSQL database has the same `runs_dir`
            and the same homes of agent CLIs, so that a takeover can resume sessions.
        host_return_s: without shared workspaces, how long a run whose session is on the host of a
            dead instance waits for that host.
        recovery_batch_rows: the most runs that one transaction of a recovery decides.
        recovery_batch_s: the intended duration of such a transaction.
        recovery_tries: failed recoveries after which the service exits.
        recovery_backoff_s: the pause after the first failed recovery. Each further pause is twice
            as long.
        safe_mode_after: the number of starts in a row without a finished recovery after which a
            start launches nothing; 0: never.
        safe_mode_window_s: the time within which starts without a finished recovery are counted.
        lease_ttl_s: how long the lease of the instance, and every process tree, lasts after the
            last renewal. The lease is renewed five times in this time.
        containment: `best_effort`, or `strict`: refuse to start if the probe cannot prove that
            hidden processes are found.
        cgroup_parent: a delegated cgroup (v2) in which each launch gets a cgroup of its own;
            empty: none.
        retry_hint_s: the time after which callers that are refused for now should retry.
        log_level: `debug`, `info`, `warning` or `error`.
        log_format: `auto`, `json` or `console`.
        tls: encrypts `listen`. Without it connections are not encrypted.
        public_reflection: whether connections without a known caller can use reflection.
        callers: the callers and their roles. Without callers every connection can make every call.
        retention: how long ended runs and their files are kept. Without it they are kept for
            ever.
        traces: the collector of spans. Without it no spans are made.
        engines: the engines that runs can use, by name.
        webhooks: addresses that get events of runs.
    """

    listen: Annotated[str, values.listen] = defaults.LISTEN
    insecure_listen: Annotated[bool, values.boolean] = False
    probe_listen: Annotated[str, values.tcp_listen] = ""
    metrics_listen: Annotated[str, values.tcp_listen] = ""
    http_listen: Annotated[str, values.tcp_listen] = ""
    http_origins: Annotated[tuple[str, ...], values.http_origins] = ()
    http_hosts: Annotated[tuple[str, ...], values.http_hosts] = ()
    console: Annotated[bool, values.boolean] = True
    data_dir: Annotated[Path, values.path] = Path("./runrecovery-data")
    runs_dir: Annotated[str, values.text] = ""
    database: Annotated[str, values.database] = field(default="", repr=False)
    database_direct: Annotated[str, values.database_direct] = field(default="", repr=False)
    instance: Annotated[str, values.name] = "default"
    max_concurrent: Annotated[int, values.whole(0, 10_000)] = 0
    max_queued: Annotated[int, values.whole(1, 10_000_000)] = 10_000
    max_attempts: Annotated[int, values.whole(1, 1_000)] = 3
    max_request_bytes: Annotated[int, values.whole(1024, 64 * 1024**2)] = 1024**2
    max_output_bytes: Annotated[int, values.whole(64 * 1024, 1024**4)] = 16 * 1024**2
    min_free_bytes: Annotated[int, values.size_bytes(0, 2**60)] = 128 * 1024**2
    max_concurrent_calls: Annotated[int, values.whole(1, 1_000_000)] = 1_000
    max_concurrent_streams: Annotated[int, values.whole(1, 1_000_000)] = 5_000
    watch_stall_s: Annotated[float, values.seconds(0.1, 3_600)] = 30.0
    reopen_window_s: Annotated[float, values.seconds(0, 365 * _DAY_S)] = 7 * _DAY_S
    cancel_grace_s: Annotated[float, values.seconds(0, 3_600)] = 5.0
    exit_grace_s: Annotated[float, values.seconds(0, 3_600)] = 10.0
    finish_s: Annotated[float, values.seconds(0, 7 * _DAY_S)] = 0.0
    drain_delay_s: Annotated[float, values.seconds(0, 3_600)] = 0.0
    stop_grace_s: Annotated[float, values.seconds(0, 3_600)] = 5.0
    orphan_grace_s: Annotated[float, values.seconds(0, 3_600)] = 2.0
    orphan_deadline_s: Annotated[float, values.seconds(0.1, 3_600)] = 10.0
    shared_workspaces: Annotated[bool, values.boolean] = False
    host_return_s: Annotated[float, values.seconds(1, 365 * _DAY_S)] = _DAY_S
    recovery_batch_rows: Annotated[int, values.whole(1, 1_000_000)] = 20_000
    recovery_batch_s: Annotated[float, values.seconds(0.01, 60)] = 0.5
    recovery_tries: Annotated[int, values.whole(1, 1_000)] = 5
    recovery_backoff_s: Annotated[float, values.seconds(0, 3_600)] = 0.5
    safe_mode_after: Annotated[int, values.whole(0, 1_000)] = 5
    safe_mode_window_s: Annotated[float, values.seconds(1, 30 * _DAY_S)] = 600.0
    lease_ttl_s: Annotated[float, values.seconds(3, 3_600)] = LEASE_TTL_S
    containment: Annotated[ContainmentPolicy, values.one_of(ContainmentPolicy)] = (
        ContainmentPolicy.BEST_EFFORT
    )
    cgroup_parent: Annotated[str, values.cgroup_parent] = ""
    retry_hint_s: Annotated[float, values.seconds(0.01, 3_600)] = 1.0
    log_level: Annotated[LogLevel, values.one_of(LogLevel)] = LogLevel.INFO
    log_format: Annotated[LogFormat, values.one_of(LogFormat)] = LogFormat.AUTO
    public_reflection: Annotated[bool, values.boolean] = False
    tls: TlsSettings | None = None
    callers: tuple[CallerSettings, ...] = ()
    retention: RetentionSettings | None = None
    traces: TraceSettings | None = None
    engines: Mapping[str, EngineSettings] = field(default_factory=dict)
    webhooks: tuple[WebhookSettings, ...] = ()

    @property
    def capacity(self) -> int:
        """Processes at one time: `max_concurrent`, or the capacity of this machine."""
        return self.max_concurrent or machine_capacity()


TABLES: Final = frozenset({"tls", "callers", "retention", "traces", "engines", "webhooks"})
"""The keys whose values are tables, which only a file can hold."""
SCALARS: Final = tuple(key.name for key in fields(Settings) if key.name not in TABLES)
"""The keys that a flag or an environment variable can set."""

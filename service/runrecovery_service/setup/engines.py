"""Builds the engine catalog from the settings, for a start and for `runrecovery check`."""

from __future__ import annotations

import os
from dataclasses import replace

from runrecovery_service.config.settings import EngineSettings, Settings
from runrecovery_service.domain.usage import Budget, cost_to_nanos
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.engines.permissions import Permissions
from runrecovery_service.engines.presets import PRESETS, dialect_of
from runrecovery_service.engines.sessions import sessions_of
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.process.agent_command import agent_environment
from runrecovery_service.trust.config_files import AgentCli, editor_of


def build_catalog(settings: Settings) -> Catalog:
    """Return the catalog of all configured engines."""
    for cli in {engine.trust for engine in settings.engines.values() if engine.trust is not None}:
        editor_of(AgentCli(cli))  # imported now, not at the first launch
    return Catalog(build_engine(name, engine) for name, engine in settings.engines.items())


def build_engine(name: str, settings: EngineSettings) -> Engine:
    """Return one engine with its dialect and its session store."""
    return Engine(
        name=name,
        command=settings.command,
        profile=settings.profile,
        dialect=_dialect(settings),
        env_allow=settings.env_allow,
        env=_agent_home(settings),
        max_concurrent=settings.max_concurrent,
        session_file=settings.session_file,
        sessions=_sessions(settings),
        unknown_session=settings.unknown_session,
        session_timeout_s=settings.session_timeout_s,
        require_user_reply=settings.require_user_reply,
        restart_policy=settings.restart_policy,
        max_resumes=settings.max_resumes if settings.resumes_interrupted else 0,
        max_run_time_s=settings.max_run_time_s,
        budget=_budget(settings),
        niceness=settings.nice,
        max_memory=settings.max_memory,
        max_open_files=settings.max_open_files,
        max_processes=settings.max_processes,
        trust=settings.trust,
    )


def _budget(settings: EngineSettings) -> Budget:
    cost = settings.max_cost_usd
    return Budget(
        max_tokens=settings.max_tokens,
        max_cost_nanos=None if cost is None else cost_to_nanos(cost),
    )


def _dialect(settings: EngineSettings) -> Dialect:
    if settings.preset is None:
        return JSON_LINES
    dialect = dialect_of(settings.preset)
    if dialect.permissions is not None:
        dialect = replace(dialect, permissions=Permissions(patterns=settings.ask_for))
    return replace(dialect, trusted=settings.trust == settings.preset)


def _sessions(settings: EngineSettings) -> CliSessions | None:
    if settings.preset is None:
        return None
    return sessions_of(settings.preset, environment_of(settings))


def _agent_home(settings: EngineSettings) -> dict[str, str]:
    if settings.preset is None or settings.agent_home is None:
        return {}
    return {PRESETS[settings.preset].home_variable: settings.agent_home}


def environment_of(engine: EngineSettings) -> dict[str, str]:
    """Return the environment in which the processes of an engine run."""
    return agent_environment(engine.env_allow, os.environ, _agent_home(engine))

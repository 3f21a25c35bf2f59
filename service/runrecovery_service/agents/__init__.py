"""Shared by recovery, execution and rpc: agent output, workspaces, session checks, trust."""

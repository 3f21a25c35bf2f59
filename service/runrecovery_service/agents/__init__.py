"""Code that recovery, execution and rpc share: agent output, workspaces, session checks, trust."""

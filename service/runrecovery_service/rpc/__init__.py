"""gRPC: the services of the contract, access, health, reflection, and errors as status codes."""

import os

# Set before any import of grpc: its fork handlers would run in every child process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

"""The only room with gRPC: the services of the contract, the gate, health, reflection, errors."""

import os

# Before grpc is imported anywhere: we start processes without fork handlers, and grpc's would
# run in every child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

"""Messages and stubs generated from proto/runrecovery/v1 (make proto)."""

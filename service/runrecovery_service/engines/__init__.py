"""What an engine is, what it says and what is said to it. No database, no gRPC, no processes."""

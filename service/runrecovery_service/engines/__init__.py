"""Engines and their dialects. No database, no gRPC, no processes."""

"""`runrecovery demo`: agents run, the service is killed, starts again and explains its decisions.

The demo uses real processes and its own temporary data directory, and leaves nothing behind. It
checks every claim that it prints; its exit code is 0 only if all claims are true.
"""

"""Three innocent processes in the shape of an agent's tree.

    look_alike.py MARK [LIMIT [USER]]

The first process leads a session and a group with its first child. The second child has a session
of its own. LIMIT is their limit on file locks, USER their user. The first process prints a line
once all three run.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

LIFETIME_S = 300
RLIMIT_LOCKS = 10


def rest() -> None:
    """Sleep until a signal or the alarm."""
    signal.alarm(LIFETIME_S)
    while True:
        time.sleep(LIFETIME_S)


if len(sys.argv) > 2:
    resource.setrlimit(RLIMIT_LOCKS, (int(sys.argv[2]),) * 2)
if len(sys.argv) > 3:
    os.setgid(int(sys.argv[3]))
    os.setuid(int(sys.argv[3]))
if os.fork() == 0:
    rest()
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.close(write)
    os.close(read)
    rest()
os.close(write)
os.read(read, 1)  # its end: the second child has a session of its own
os.write(1, b"ready\n")
rest()

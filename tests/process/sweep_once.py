"""Run one sweep in a process of its own: markers as JSON in argv, result as JSON on stderr.

With "at-once" as a further argument there is no grace. With "marked" this process has the watermark
itself. With a number it sweeps as the user with this id. It becomes that user after all imports,
because the user may lack access to this Python.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import sys

from runrecovery_service.process.host import Host
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.procfs import RLIMIT_LOCKS
from runrecovery_service.process.tree_ending import end_trees

PR_SET_DUMPABLE = 4

given = json.loads(sys.argv[1])
lease = LaunchMarkers(**{**given, "host": Host(**given["host"])})
words = sys.argv[2:]
grace_s = 0 if "at-once" in words else 1
users = [int(word) for word in words if word.isdigit()]
if "marked" in words:
    resource.setrlimit(RLIMIT_LOCKS, (lease.watermark or 0, lease.watermark or 0))
for user in users:
    Host.here()
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as in a service of this user
ending = end_trees([lease], why="test", grace_s=grace_s, deadline_s=5)[lease.launch_key]
told = {**dataclasses.asdict(ending), "dead": sorted(ending.dead)}
sys.stderr.write(json.dumps(told))

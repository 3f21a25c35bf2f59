"""Run one sweep in a process of its own: markers as JSON in argv, result as JSON on stderr.

With "marked" as the next argument this process has the watermark itself. With a number as the next
argument it sweeps as the user with this id. It becomes that user after all imports, because the
user may lack access to this Python.
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
from runrecovery_service.process.sweep import end_trees

PR_SET_DUMPABLE = 4

given = json.loads(sys.argv[1])
lease = LaunchMarkers(**{**given, "host": Host(**given["host"])})
if sys.argv[2:] == ["marked"]:
    resource.setrlimit(RLIMIT_LOCKS, (lease.watermark or 0, lease.watermark or 0))
elif sys.argv[2:]:
    Host.here()
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as in a service of this user
ending = end_trees([lease], why="test", grace_s=1, deadline_s=5)[lease.launch_key]
told = {**dataclasses.asdict(ending), "dead": sorted(ending.dead)}
sys.stderr.write(json.dumps(told))

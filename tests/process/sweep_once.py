"""Runs one sweep in a process of its own: lease as JSON in argv, ending as JSON on stdout."""

from __future__ import annotations

import dataclasses
import json
import sys

from runrecovery_service.process.evidence import LeaseEvidence
from runrecovery_service.process.sweep import end_trees

lease = LeaseEvidence(**json.loads(sys.argv[1]))
ending = end_trees([lease], grace_s=1, deadline_s=5)[lease.lease_key]
sys.stderr.write(json.dumps(dataclasses.asdict(ending)))

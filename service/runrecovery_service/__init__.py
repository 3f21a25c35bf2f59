"""The service of runrecovery: its packages and main modules.

- `cli`: the `runrecovery` command.
- `app`: builds every object. `lifecycle`: the order of a start and of a stop.
  `lease_renewal`: lease, tree deadline, self-fencing. `offline`: check, migrate, back up.
- `rpc`: gRPC: services, validation, access, health, reflection, errors.
- `recovery`: decides on unfinished runs, at a start before SERVING, at a planned stop, and in a
  takeover. `execution`: runs agents while the service is SERVING. Neither imports the other:
  recovery writes rows, and execution reads them to find its work.
- `agents`: what recovery, execution and rpc share about agents and their files.
- `storage`: tables and use cases, one transaction each. `process`: /proc and signals.
  `engines`: agent programs and their dialects. `trust`: entries in the files of agent CLIs.
- `domain`: what a run is, and what a restart does with a run. No I/O.

Imports run downwards only (`make imports`).
"""

__version__ = "0.1.0"

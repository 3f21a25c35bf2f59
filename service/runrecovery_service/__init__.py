"""runrecovery, the service. The rooms, from the street inwards:

- `cli`: the `runrecovery` command.
- `app`: the only place that builds objects. `lifecycle`: the order of a start and of a stop.
  `ownership`: what keeps a service the owner of its runs. `offline`: work without a server.
- `rpc`: the only room with gRPC: the services, the gate, health, reflection, errors.
- `recovery`: what happens between a start and SERVING. `execution`: what happens after it.
  They do not know each other: recovery leaves rows, execution finds its work in them.
- `storage`: tables and use cases, one transaction each. `process`: /proc and signals.
  `engines`: what an engine is and what it says. `trust`: entries in agent CLIs' own files.
- `domain`: what a run is and what a restart does with it. Pure.

Imports run downwards only (`make imports`).
"""

__version__ = "0.1.0"

"""`make demo-replicas`: of three replicas on one PostgreSQL one dies, one freezes, one stops.

Separate from the service's package, because it needs a PostgreSQL server from the development
requirements.
"""

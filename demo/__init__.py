"""Demos from the repository: `make console`, `make screenshots`, `make demo-replicas`.

They are separate from the service's package, because they need development requirements: playwright
for the pictures, and a PostgreSQL server for the replicas. Of the three replicas on one PostgreSQL
one dies, one freezes, and the third makes a planned stop.
"""

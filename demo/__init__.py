"""`make demo-replicas`: three replicas on one PostgreSQL, of which one dies and one freezes.

The third one makes a planned stop. This package is separate from the service's, because it needs a
PostgreSQL server from the development requirements.
"""

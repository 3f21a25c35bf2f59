"""The only room with peewee and SQL.

Each public function of a use-case module is one transaction and returns frozen domain values;
no row leaves the room. Times are integer microseconds UTC inside, aware datetimes outside.
"""

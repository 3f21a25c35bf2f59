"""The store. No other package uses peewee or SQL.

Each public function of a use-case module is one transaction and returns frozen domain values. No
row leaves this package. Times are integer microseconds UTC inside, and aware datetimes outside.
"""

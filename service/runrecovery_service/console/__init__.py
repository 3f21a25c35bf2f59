"""The console: pages for the people who answer questions and operate the service.

It is imported when `http_listen` is set and `console` is true. Pages read and change runs by the
contract alone, through `http/calls.py`: what a caller may do is decided where gRPC decides it.
"""

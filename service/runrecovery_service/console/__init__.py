"""The console: pages for the people who answer questions and operate the service.

It is imported when `http_listen` is set and `console` is true. Pages read and change runs only by
calls of the gRPC contract, through `http/calls.py`. So a caller has the same rights as over gRPC.
"""

"""Arithmetic and tables: no clock, no I/O on the request path, no Redis, no Starlette."""

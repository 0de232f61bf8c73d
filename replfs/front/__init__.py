"""FUSE: unpack a request, submit it, reply.

Nothing is imported here on purpose: `front.mounting` must stay usable by commands that load
neither pyfuse3 nor trio, and only a node that really mounts pays for `front.session`.
"""

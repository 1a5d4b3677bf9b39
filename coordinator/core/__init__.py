"""The pure core: membership, rounds and pacing. Events and the time go in, decisions come out.

Nothing here does I/O, reads a clock or starts a thread; the daemon runs it in production and a test or
a simulator runs it in virtual time.
"""

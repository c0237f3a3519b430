"""Every patch of an upstream library, one file or folder a library, each with its upstream line and when it goes.

One stands elsewhere: `parallel/p2p.py` gives Megatron's schedules another communicator, for one run of a schedule.
"""

"""A simulation of a primary and its replicas in one process: one seed gives one run.

The nodes are the real ones, on real directories. Simulated are time, randomness, threads, the
network between the nodes (`network`), the kernel that asks the primary (`kernel`), and death: a
node can be killed at any await and between any two system calls (`life`).
"""

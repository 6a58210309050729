"""Ops of the engine, one file each.

Every op here is plain torch: it is the path that CPUs run and the oracle for the CUDA kernel of the same
signature. Ops take and return tensors only; they know nothing of requests, blocks in use or policies.
"""

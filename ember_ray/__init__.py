"""Ember Ray: reinforcement learning of small language models on one to a few GPUs.

Everything in this package runs inside one process and knows nothing of Ray.
"""

__version__ = "0.1.0"

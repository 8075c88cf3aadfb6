"""Threads, and copies that are ordered against compute. No other folder starts a thread or a stream.

``base`` is the seam of copy engines. Threads (``threads``, ``writer``) need no torch.
"""

"""The whole protocol: one file per direction, every message frozen and typed. Fields only get appended.

First line of each message: who -> whom, when. Second: what the reader must do.
"""

"""The wire protocol: one file per direction; every message is frozen and typed; fields are only appended.

The first line of each docstring says who sends the message to whom and when, the next what the reader must do.
"""

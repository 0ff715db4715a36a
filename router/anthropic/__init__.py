"""``/v1/messages``, Anthropic's Messages API.

``schemas`` and ``messages`` make a chat request of a body, ``writer`` writes the answer, ``errors`` the errors.
"""

"""``/v1/responses``, OpenAI's Responses API without stored state.

``schemas`` and ``items`` make a chat request of a body, ``writer`` writes the answer.
"""

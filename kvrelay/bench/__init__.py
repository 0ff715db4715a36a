"""A benchmark client for OpenAI-compatible servers: ``kvrelay bench URL``.

Life of a run: a load makes conversations (``loads``) of prompts (``prompts``); arrivals say when each begins
(``arrivals``); the runner sends them (``runner``, ``streams``, ``http``) and keeps a record of each request; the
records become metrics (``metrics``), and these a table, a JSON file or a picture (``report``, ``plot``, ``compare``).
"""

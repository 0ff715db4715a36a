"""How nodes and routers find each other through Redis: nodes keep an entry there, routers read them all.

The registry only tells where to look. Who is alive, and what it is doing, nodes and routers tell each other.
"""

"""Keras models read from outside: their graph, their layers on the way, how they end, who they are.

Nothing here knows of teachers, losses or files.
"""

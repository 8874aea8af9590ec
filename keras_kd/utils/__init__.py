"""What every part needs and none owns: files, tables, text, types, masks, checks of arguments.

Nothing here imports another part of the package.
"""

"""bigbatch: the big batch you want, on the memory you have, exactly.

Importing `bigbatch` imports no framework. The doors are in the rooms: `import bigbatch.torch as bb`, and so on.
"""

__version__ = "0.2.0"

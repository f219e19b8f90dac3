"""bigbatch: the big batch you want, on the memory you have, exactly.

Importing `bigbatch` imports no framework. Import a framework's package: `import bigbatch.torch as bb`.
"""

__version__ = "0.2.0"

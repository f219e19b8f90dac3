"""Speed, and nothing else: twins of plain loops that reach the same sums with less work.

Packages ask for it in one place and do without it: delete this folder, and everything runs and every law holds.
"""

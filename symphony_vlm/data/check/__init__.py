"""The check of data before training: one pass over every record and every picture, at bounded memory.

`check_data` makes the pass; ``faults.py`` names what can be wrong; ``terminal.py``, ``page.py`` and ``summary.py``
show what was found.
"""

"""Ways to make a network cheaper: one file per idea. AFS, the dynamic one, is `selection.py` with `schedule.py`.

::

    widths.py    what is left of a network whose channels were cut away, as data
    pruning.py   cut to a budget through torch-pruning, in one stage or several
    l1.py        which channels: smallest L1 norm        slimming.py  which: smallest batch norm scale, made sparse
    small.py     a smaller pretrained network instead    lowres.py    the same network on smaller images
"""

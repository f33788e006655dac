"""`afds compare`: methods x budgets x seeds x data sets through the one `fit`, and a table that settles it.

::

    rows.py    `afds[distillation.afd=0]`: a method with options of its own
    plan.py    options, and which trials they mean: bases, tuning, final runs
    run.py     the trials, resumed where they were, one after another or in parallel
    stats.py   means, paired differences and their intervals
    table.py   terminal, Markdown, JSON        page.py   the figures and the HTML page
"""

"""Which traces are worth learning from: one file a filter.

A filter is a section of the recipe (its settings) that can judge: a class with fields, reasons, a verdict and examples,
in a file of its own. Its line in `distill.recipe.filter.Filter` puts it into the recipe, into the funnel at that place,
into the summary, the report and the tests. `pipeline.py` is the stage that runs them.

The recipe imports this package, so only `pipeline.py` and `summary.py` may import the recipe or a run.
"""
